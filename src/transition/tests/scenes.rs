//! What the loop does, and leaves undone, in whole scenes.

use super::world::*;

#[test]
fn noise_moves_nothing_in_an_hour() {
    for (step, n_workers, noise) in [
        (0.5, 2, USUAL),
        (1.0, 2, Noise { sigma: 0.2, spikes: 0.05, ..USUAL }),
        (5.0, 3, Noise { sigma: 0.15, spikes: 0.02, pauses: (120.0, 5.0) }),
    ] {
        // One worker drifts, slowly and by less than the threshold.
        let drift = |w: usize, t: f64| 1.0 + if w == 0 { 0.08 * (t / 500.0).sin() } else { 0.0 };
        let story = World { noise, ..World::new(step, n_workers, drift) }.run(3600.0, 1);
        assert!(story.adopted().is_empty(), "step {step}: {}", story.told());
    }
}

/// `tests/data/undisturbed_steps.csv` tells what was recorded.
#[test]
fn an_hour_of_recorded_steps_moves_nothing() {
    let recording = Recording::parse(include_str!("../../../tests/data/undisturbed_steps.csv"));
    assert!(recording.seconds() > 400.0);
    let story = World::recorded(&recording).run(3600.0, 1);
    assert!(story.adopted().is_empty(), "{}", story.told());
    // The same loop on the same jitter does answer a worker that slows down.
    let slowed = recording.slowed(0, 300.0, 0.5);
    assert!(!World::recorded(&slowed).run(slowed.seconds(), 1).adopted().is_empty());
}

#[test]
fn a_slow_down_is_answered_in_a_handful_of_steps_after_the_dwell_time() {
    for (step, slow_down, at_most) in [(0.1, 0.3, 15.0), (0.5, 0.4, 20.0), (0.5, 0.6, 20.0), (2.0, 0.5, 60.0)] {
        let speed = move |w: usize, t: f64| if w == 1 && t >= 300.0 { 1.0 - slow_down } else { 1.0 };
        let story = World::new(step, 3, speed).run(420.0, 2);
        let [first] = story.adopted()[..] else { panic!("step {step} slowed by {slow_down}: {}", story.told()) };
        assert!((300.0..300.0 + at_most).contains(&first), "step {step} slowed by {slow_down}: {}", story.told());
    }
}

#[test]
fn capacity_that_returns_is_used() {
    let speed = |w: usize, t: f64| if w == 1 && (200.0..500.0).contains(&t) { 0.5 } else { 1.0 };
    let story = World::new(0.5, 3, speed).run(700.0, 3);
    let [left, back] = story.adopted()[..] else { panic!("{}", story.told()) };
    assert!(left < 230.0 && (500.0..560.0).contains(&back), "{}", story.told());
}

/// When a worker is slow: 150 s of every 400 s.
const ONSETS: [f64; 5] = [200.0, 600.0, 1000.0, 1400.0, 1800.0];

#[test]
fn a_contention_seen_twice_is_met_before_its_onset() {
    let slow = |t: f64| ONSETS.iter().any(|&o| (o..o + 150.0).contains(&t));
    let story = World::new(0.5, 3, |w, t| if w == 1 && slow(t) { 0.5 } else { 1.0 }).run(1900.0, 4);
    for onset in &ONSETS[2..] {
        let in_time = story.adopted().iter().any(|&t| (onset - 30.0..*onset).contains(&t));
        assert!(in_time, "nothing is done before {onset}: {}", story.told());
    }
    assert!(story.saved > 0.08, "saved {}: {}", story.saved, story.told());
}

#[test]
fn load_that_comes_and_goes_at_random_does_not_flap_plans() {
    for (length, seed) in [(20.0, 5), (60.0, 6)] {
        let mut dice = Dice::new(seed);
        let mut edges = vec![0.0f64];
        while edges[edges.len() - 1] < 1800.0 {
            edges.push(edges[edges.len() - 1] + length * (0.4 + 1.2 * dice.uniform()));
        }
        let slow = |t: f64| edges.partition_point(|&e| e <= t) % 2 == 0;
        let story = World::new(0.5, 2, |w, t| if w == 1 && slow(t) { 0.6 } else { 1.0 }).run(1800.0, seed);
        let n = story.adopted().len();
        assert!(3 * n <= edges.len(), "{n} moves, the load changed {} times: {}", edges.len(), story.told());
        assert!(story.saved > -0.03, "length {length} lost {}: {}", -story.saved, story.told());
    }
}

#[test]
fn nobody_moves_just_before_the_end() {
    let speed = |w: usize, t: f64| if w == 1 && t >= 100.0 { 0.7 } else { 1.0 };
    let world = World { steps: Some(210), pause: 4.0, ..World::new(0.5, 3, speed) };
    let story = world.run(1000.0, 8);
    assert!(story.steps == 210 && story.adopted().is_empty(), "{}", story.told());
}
