//! Deliberate failures, for tests of survival: a worker fails by itself when it reaches a point for the nth time.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where a worker can be made to fail.
pub const POINTS: [&str; 9] = ["prepare", "ready", "begin", "step", "commit", "moving", "switched", "release", "save"];

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The process ends at once.
    Kill,
    /// The thread does nothing any more.
    Hang,
}

/// `kill@moving`, `hang@step:7`: how, where, and at which arrival (the first when absent).
#[derive(Clone, Debug)]
pub struct Fail {
    how: How,
    point: &'static str,
    left: Arc<AtomicU32>,
}

impl FromStr for Fail {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not HOW@POINT or HOW@POINT:N; HOW is kill or hang, POINT one of {POINTS:?}");
        let (how, rest) = text.split_once('@').ok_or_else(wrong)?;
        let (point, nth) = rest.split_once(':').unwrap_or((rest, "1"));
        let how = match how {
            "kill" => How::Kill,
            "hang" => How::Hang,
            _ => return Err(wrong()),
        };
        let point = POINTS.into_iter().find(|p| *p == point).ok_or_else(wrong)?;
        let nth: u32 = nth.parse().ok().filter(|n| *n > 0).ok_or_else(wrong)?;
        Ok(Self { how, point, left: Arc::new(AtomicU32::new(nth)) })
    }
}

impl Fail {
    /// Fails, if it is time.
    pub fn reach(&self, point: &str) {
        if self.point != point || self.left.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        match self.how {
            How::Kill => std::process::abort(),
            How::Hang => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_how_where_and_when() {
        let fail: Fail = "hang@step:7".parse().unwrap();
        assert_eq!((fail.how, fail.point, fail.left.load(Ordering::SeqCst)), (How::Hang, "step", 7));
        for wrong in ["kill", "kill@nowhere", "sing@step", "kill@step:0", "kill@step:x"] {
            assert!(wrong.parse::<Fail>().unwrap_err().contains(wrong), "{wrong}");
        }
    }
}
