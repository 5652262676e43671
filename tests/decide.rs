//! Decisions over time: no move on noise, a move when a device has really become slower, none before its time.

use foreshard::plan::ShardId;
use foreshard::transition::{
    Candidate, Decision, Keep, Link, Memory, Mode, Observed, Proposal, Running, Settings, Snapshot, Tracker, Wait,
    Watched, Worker, decide, trigger,
};
use foreshard::units::{Bytes, Seconds};
use proptest::prelude::*;

const STEP: f64 = 0.5;
const BUSY: f64 = 0.4;

/// Two workers after the steps that `trackers` have seen.
fn snapshot(step: u64, time: f64, steps: &Tracker, busy: &[Tracker; 2]) -> Snapshot {
    let worker = |(rank, busy): (u32, &Tracker)| Worker {
        rank,
        shard: ShardId(rank),
        predicted_busy: Seconds(BUSY),
        busy: busy.observed(),
        speed: busy.observed().now().map_or(1.0, |b| BUSY / b),
        speed_forecast: None,
        memory: Memory { planned: Bytes(1 << 20), used: Bytes(1 << 20), limit: Bytes(1 << 30), forecast: None },
        cpu: Watched::default(),
        link: Link::default(),
    };
    let (since_step, since) = (0, Seconds(0.0));
    Snapshot {
        step,
        time: Seconds(time),
        steps_left: None,
        settings: Settings::default(),
        running: Running {
            revision: 1,
            since_step,
            since,
            predicted: Seconds(STEP),
            observed: steps.observed(),
            forecast: None,
        },
        workers: (0..).zip(busy).map(worker).collect(),
        proposal: None,
        moves: Vec::new(),
        in_flight: None,
        considered: None,
        approved: None,
    }
}

/// A plan that takes half as long as the running one, for the whole horizon.
fn better(made: f64, running: f64) -> Proposal {
    Proposal::Plans(vec![Candidate {
        revision: 2,
        made: Seconds(made),
        interval: Seconds(5.0),
        running: vec![Seconds(running); 60],
        step_times: vec![Seconds(0.5 * running); 60],
        memory: vec![Bytes(1 << 20); 2],
        bytes_to_move: Bytes(1 << 20),
        pause: Seconds(0.1),
        prepare: Seconds(5.0),
    }])
}

/// Runs steps of the durations that `of(step)` gives, factors of the usual; calls `seen` after each.
fn train(n: u64, mut of: impl FnMut(u64) -> f64, mut seen: impl FnMut(&Snapshot)) {
    let (mut steps, mut busy, mut time) = (Tracker::default(), [Tracker::default(), Tracker::default()], 0.0);
    for step in 0..n {
        let factor = of(step);
        let seconds = STEP * factor;
        time += seconds;
        steps.push(Seconds(seconds), seconds);
        busy.iter_mut().for_each(|b| b.push(Seconds(seconds), BUSY * factor));
        seen(&snapshot(step, time, &steps, &busy));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// An hour of jitter as real jobs have it: a few percent, skewed, with a pause now and then.
    #[test]
    fn noise_moves_nothing(
        jitter in proptest::collection::vec((0.0f64..1.0, 0.0f64..1.0), 7200),
        spread in 0.01f64..0.08,
    ) {
        let mut triggered = 0;
        let noise = |i: u64| {
            let (u, v) = jitter[i as usize];
            let normal = (-2.0 * u.max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            let pause = if i % 500 == 250 { 4.0 } else { 0.0 };
            (spread * normal).exp() + pause
        };
        train(7200, noise, |s| triggered += u32::from(trigger(s).is_some()));
        prop_assert_eq!(triggered, 0);
    }
}

#[test]
fn a_device_that_has_become_slower_is_noticed_after_the_dwell_time_and_answered() {
    let (slow_at, mut noticed, mut adopted) = (200, None, None);
    train(
        260,
        |step| if step < slow_at { 1.0 } else { 1.6 },
        |s| {
            if let Decision::Wait { reason: Wait::Unsolved, .. } = decide(s) {
                noticed.get_or_insert((s.step, s.time));
                let asked = Snapshot { proposal: Some(better(s.time.0, 1.6 * STEP)), ..s.clone() };
                if let Decision::Adopt { revision, .. } = decide(&asked) {
                    adopted.get_or_insert((s.step, revision));
                }
            }
        },
    );
    let (step, _) = noticed.expect("60 % is noticed");
    assert!(step > slow_at, "before it happened");
    let after = (step - slow_at) as f64 * 1.6 * STEP;
    let dwell = Settings::default().dwell.0;
    // Half of the window has to have moved.
    assert!(after >= 0.5 * dwell && after <= 3.0 * dwell, "noticed after {after} s, dwell is {dwell} s");
    assert_eq!(adopted, Some((step, 2)));
}

#[test]
fn what_is_wanted_may_still_have_to_wait_or_be_kept() {
    let mut last = None;
    train(400, |step| if step < 200 { 1.0 } else { 1.6 }, |s| last = Some(s.clone()));
    let slow = last.unwrap();
    let asked = Snapshot { proposal: Some(better(slow.time.0, 1.6 * STEP)), ..slow };
    assert!(matches!(decide(&asked), Decision::Adopt { revision: 2, .. }));

    let with = |change: &dyn Fn(&mut Snapshot)| {
        let mut changed = asked.clone();
        change(&mut changed);
        decide(&changed)
    };
    assert_eq!(with(&|s| s.settings.mode = Mode::Off), Decision::Keep { reason: Keep::Off });
    let waits = with(&|s| s.settings.mode = Mode::Recommend);
    assert!(matches!(waits, Decision::Wait { reason: Wait::Approval { revision: 2, .. }, .. }), "{waits}");
    let moving = with(&|s| s.in_flight = Some(3));
    assert!(matches!(moving, Decision::Wait { reason: Wait::InFlight { revision: 3 }, .. }), "{moving}");
    let small = with(&|s| s.settings.min_gain = 0.9);
    assert!(matches!(small, Decision::Keep { reason: Keep::SmallGain { .. } }), "{small}");
    let dear = with(&|s| {
        if let Some(Proposal::Plans(plans)) = &mut s.proposal {
            plans[0].pause = Seconds(1000.0);
        }
    });
    assert!(!matches!(dear, Decision::Adopt { .. }), "{dear}");
    let large = with(&|s| {
        if let Some(Proposal::Plans(plans)) = &mut s.proposal {
            plans[0].memory[1] = Bytes(2 << 30);
        }
    });
    assert!(matches!(large, Decision::Refuse { .. }), "{large}");
    assert!(large.to_string().contains("worker 1"), "{large}");
}

#[test]
fn a_snapshot_survives_being_written_down() {
    let mut last = None;
    train(50, |_| 1.0, |s| last = Some(s.clone()));
    let snapshot = Snapshot { proposal: Some(better(1.0, STEP)), ..last.unwrap() };
    let again: Snapshot = serde_json::from_str(&serde_json::to_string(&snapshot).unwrap()).unwrap();
    assert_eq!(again, snapshot);
    assert_eq!(decide(&again), decide(&snapshot));
    assert_eq!(Observed::default().now(), None);
}
