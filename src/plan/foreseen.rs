//! What devices and links are foreseen to do, and the pictures of it that a plan is worth looking for.
//!
//! A forecast has a value and an interval for each moment; a plan is made for one picture of devices and links. Whoever
//! asks makes a plan for each [`View`] and weighs them against every moment: no view has to be right.

use std::collections::BTreeMap;

use crate::forecast::{Band, Forecast};
use crate::topology::{DeviceId, Slowed, Topology};
use crate::units::Seconds;

/// Intervals of a forecast that are the near future.
const NEAR: usize = 4;
/// The quantile that a cautious plan is made for.
pub const CAUTIOUS: f64 = 0.05;
/// Intervals are wide where the cautious quantile lies below what is expected by this share of it.
const WIDE: f64 = 0.2;
/// No multiplier is less: times made of it are numbers.
const LEAST: f64 = 1e-3;

/// A quantity over a horizon.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    pub now: f64,
    /// Without one the present stays.
    pub forecast: Option<Forecast>,
    /// The value that is a multiplier of 1.
    pub one: f64,
}

/// A picture of the horizon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum View {
    /// As it is now.
    Present,
    /// The mean of the next few intervals.
    Near,
    /// Each device and link at the slowest moment expected of it.
    Slowest,
    /// The mean over the horizon of this quantile: 0.5 is what is expected.
    Mean { quantile: f64 },
}

/// Multipliers of devices and links over a horizon.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Foreseen {
    /// When it is asked.
    pub now: Seconds,
    /// Of speeds; devices that are not named keep theirs.
    pub speeds: BTreeMap<DeviceId, Outlook>,
    /// Of bandwidth, by the devices at both ends, the lower one first.
    pub links: BTreeMap<[DeviceId; 2], Outlook>,
}

impl Outlook {
    /// What stays as it is.
    pub fn steady(now: f64) -> Self {
        Self { now, forecast: None, one: 1.0 }
    }

    /// The multiplier expected so long after `now`.
    pub fn expect(&self, now: Seconds, after: Seconds) -> f64 {
        // What is a whole number of intervals shall not be one less for a rounding.
        let ahead = |f: &Forecast| (after / f.interval + 1e-6).max(0.0) as usize;
        self.forecast.as_ref().map_or(self.now, |f| f.expect(now, self.now, ahead(f))) / self.one
    }

    /// The multiplier in a picture.
    pub fn view(&self, now: Seconds, view: View) -> f64 {
        let Some(forecast) = self.forecast.as_ref().filter(|f| f.horizon() > 0) else { return self.now / self.one };
        let value = match view {
            View::Present => self.now,
            View::Near => (0..NEAR).map(|i| forecast.expect(now, self.now, i)).sum::<f64>() / NEAR as f64,
            View::Slowest => forecast.min().band.mean,
            View::Mean { quantile } => quantile_of(&forecast.average(), forecast.level, quantile),
        };
        value / self.one
    }

    /// Whether so little is certain that a plan made for what is expected may be the wrong one.
    pub fn is_wide(&self) -> bool {
        let [cautious, expected] = [CAUTIOUS, 0.5].map(|quantile| self.view(Seconds(0.0), View::Mean { quantile }));
        cautious < expected * (1.0 - WIDE)
    }
}

/// A quantile of a band that holds `level` of the values, half of the others on each side: along straight lines from its
/// lower edge to its middle to its upper edge, and no further than these.
fn quantile_of(band: &Band, level: f64, quantile: f64) -> f64 {
    let outside = (1.0 - level) / 2.0;
    // From 0 in the middle to 1 at the edges.
    let away = ((quantile - 0.5).abs() / (0.5 - outside)).min(1.0);
    let edge = if quantile < 0.5 { band.lower } else { band.upper };
    band.mean + (edge - band.mean) * away
}

impl Foreseen {
    /// The pictures that plans are to be made for. With caution only where intervals are wide: elsewhere that plan is the
    /// one for what is expected, or hardly another.
    pub fn views(&self) -> Vec<View> {
        let mut views = vec![View::Present, View::Near, View::Slowest, View::Mean { quantile: 0.5 }];
        if self.speeds.values().chain(self.links.values()).any(Outlook::is_wide) {
            views.push(View::Mean { quantile: CAUTIOUS });
        }
        views
    }

    /// Devices and links in a picture. `base`: where all multipliers are 1.
    pub fn at(&self, base: &Topology, view: View) -> Topology {
        self.with(base, |outlook| outlook.view(self.now, view))
    }

    /// The speed that is expected of a device so long from now.
    pub fn speed(&self, device: DeviceId, after: Seconds) -> f64 {
        self.speeds.get(&device).map_or(1.0, |outlook| outlook.expect(self.now, after)).max(LEAST)
    }

    /// Links as they are expected so long from now, devices as they are in `base`.
    pub fn links_at(&self, base: &Topology, after: Seconds) -> Topology {
        let links = Self { speeds: BTreeMap::new(), ..self.clone() };
        links.with(base, |outlook| outlook.expect(self.now, after))
    }

    fn with(&self, base: &Topology, of: impl Fn(&Outlook) -> f64) -> Topology {
        let mut topology = base.clone();
        for (device, outlook) in &self.speeds {
            if let Some(device) = topology.devices.get_mut(device.index()) {
                device.speed *= of(outlook).max(LEAST);
            }
        }
        // No link carries more than it is said to: what is measured above that is no gain to plan for.
        let shares = self.links.iter().map(|(&between, outlook)| (between, of(outlook).clamp(LEAST, 1.0)));
        let slowed = shares.filter(|(_, share)| *share < 1.0).map(|(between, share)| Slowed { between, share });
        topology.slowed.extend(slowed);
        topology
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::parse_devices;
    use crate::units::BytesPerSec;

    fn outlook(lower: f64, mean: [f64; 2], one: f64) -> Outlook {
        let forecast = Forecast::of(Seconds(0.0), Seconds(10.0), [vec![lower; 2], mean.to_vec(), vec![mean[0]; 2]]);
        Outlook { now: mean[0], forecast: Some(forecast), one }
    }

    #[test]
    fn a_quantile_lies_between_what_is_expected_and_the_edges() {
        let band = Band { lower: 0.2, mean: 0.6, upper: 1.0 };
        let found = [0.0, 0.1, 0.3, 0.5, 0.7, 0.95].map(|q| quantile_of(&band, 0.8, q));
        let expected = [0.2, 0.2, 0.4, 0.6, 0.8, 1.0];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
    }

    #[test]
    fn every_device_and_link_has_its_own_multiplier_in_each_picture() {
        let base = parse_devices("3xcpu").unwrap();
        let [a, b] = [DeviceId(0), DeviceId(2)];
        // A link of 1 GB/s of which 200 to 800 MB/s are seen.
        let link = outlook(1e8, [8e8, 2e8], base.local.bandwidth.0);
        let foreseen = Foreseen {
            now: Seconds(0.0),
            speeds: [(DeviceId(1), outlook(0.1, [1.0, 0.5], 1.0))].into(),
            links: [([a, b], link)].into(),
        };
        let found = |topology: &Topology| {
            let bandwidth = topology.link(b, a).bandwidth;
            let rounded = |share: f64| (share * 1e6).round() / 1e6;
            ([0, 1, 2].map(|d| rounded(topology.devices[d].speed)), rounded(bandwidth.0 / base.local.bandwidth.0))
        };
        let in_view = |view| found(&foreseen.at(&base, view));
        assert_eq!(in_view(View::Present), ([1.0, 1.0, 1.0], 0.8));
        assert_eq!(in_view(View::Slowest), ([1.0, 0.5, 1.0], 0.2));
        assert_eq!(in_view(View::Mean { quantile: 0.5 }), ([1.0, 0.75, 1.0], 0.5));
        assert_eq!(in_view(View::Mean { quantile: CAUTIOUS }), ([1.0, 0.1, 1.0], 0.1));
        assert_eq!(foreseen.at(&base, View::Slowest).link(a, DeviceId(1)).bandwidth, BytesPerSec(1e9));
        assert_eq!(found(&foreseen.links_at(&base, Seconds(10.0))), ([1.0; 3], 0.2));
        assert_eq!(foreseen.views().len(), 5);
    }

    #[test]
    fn where_all_is_certain_no_picture_is_added() {
        let narrow = Foreseen { speeds: [(DeviceId(0), outlook(0.9, [1.0, 1.0], 1.0))].into(), ..Foreseen::default() };
        assert_eq!(narrow.views().len(), 4);
        let steady = Foreseen { speeds: [(DeviceId(0), Outlook::steady(0.3))].into(), ..Foreseen::default() };
        assert_eq!(steady.views().len(), 4);
    }
}
