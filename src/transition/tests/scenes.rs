//! What the loop does, and leaves undone, in whole scenes.

use super::world::*;
use crate::transition::*;
use crate::units::Seconds;

fn labels(world: &World<'_>) -> std::collections::BTreeMap<&'static str, usize> {
    let mut out = std::collections::BTreeMap::new();
    world.records.iter().for_each(|r| *out.entry(r.decision.label()).or_default() += 1);
    out
}

#[test]
fn noise_moves_nothing_in_an_hour() {
    for (step, noise) in [
        (0.5, USUAL),
        (0.5, Noise { sigma: 0.2, spikes: 0.05, ..USUAL }),
        (5.0, Noise { sigma: 0.15, spikes: 0.03, pause: 5.0, ..USUAL }),
    ] {
        for seed in 0..3 {
            // A drift below the threshold.
            let drift = |w: usize, t: f64| 1.0 + if w == 0 { 0.08 * (t / 500.0).sin() } else { 0.0 };
            let mut world = World { noise, ..World::new(step, 3, drift) };
            world.run(3600.0, seed);
            assert_eq!(world.adopted(), [] as [f64; 0], "step {step}, seed {seed}: {:?}", labels(&world));
        }
    }
}

#[test]
fn a_slow_down_is_answered_soon() {
    for (step, slow_down) in [(0.1, 0.3), (0.5, 0.3), (0.5, 0.6), (2.0, 0.45), (10.0, 0.6)] {
        for seed in 0..3 {
            let began = 400.0;
            let speed = move |w: usize, t: f64| if w == 1 && t >= began { 1.0 - slow_down } else { 1.0 };
            let mut world = World::new(step, 3, speed);
            world.run(began + 200.0, seed);
            let first =
                world.adopted().first().copied().unwrap_or_else(|| panic!("{step} {slow_down} {:?}", labels(&world)));
            println!(
                "step {step} slow {slow_down} seed {seed}: {:.1} s after; {:?} {:?}",
                first - began,
                world.adopted(),
                labels(&world)
            );
        }
    }
}

#[test]
fn a_contention_that_repeats_is_foreseen() {
    for seed in 0..3 {
        let slow = |t: f64| t >= 200.0 && (t - 200.0) % 400.0 < 150.0;
        let speed = move |w: usize, t: f64| if w == 1 && slow(t) { 0.5 } else { 1.0 };
        let mut world = World::new(0.5, 3, speed);
        world.settings.horizon = Seconds(300.0);
        let gain = world.run(3000.0, seed);
        println!("seed {seed} gain {gain:.3} adopted {:?} {:?}", world.adopted(), labels(&world));
        println!(
            "   cutovers {:?}",
            world.cutovers.iter().map(|c| (c.0.round(), (c.1[1] * 100.0).round())).collect::<Vec<_>>()
        );
    }
}

#[test]
fn flapping_load_does_not_flap_plans() {
    for seed in 0..3 {
        for length in [8.0, 20.0, 45.0, 90.0] {
            let mut dice = Dice::new(seed + 77);
            let mut edges = vec![0.0f64];
            while *edges.last().unwrap() < 3600.0 {
                let next = edges.last().unwrap() + length * (0.4 + 1.2 * dice.uniform());
                edges.push(next);
            }
            let speed = move |w: usize, t: f64| {
                let slow = edges.partition_point(|&e| e <= t) % 2 == 0;
                if w == 1 && slow { 0.6 } else { 1.0 }
            };
            let mut world = World::new(0.5, 3, speed);
            let gain = world.run(3600.0, seed);
            println!("length {length} seed {seed} gain {gain:.3} adopted {:?} {:?}", world.adopted(), labels(&world));
        }
    }
}

#[test]
fn zz_debug() {
    let args: Vec<u64> =
        std::env::var("SCENE").unwrap_or("0 0".into()).split(' ').map(|s| s.parse().unwrap()).collect();
    let seed = args[1];
    let drift = |w: usize, t: f64| 1.0 + if w == 0 { 0.08 * (t / 500.0).sin() } else { 0.0 };
    let (mut world, until) = match args[0] {
        0 => (World { noise: USUAL, ..World::new(0.5, 3, drift) }, 3600.0),
        1 => (World { noise: Noise { sigma: 0.2, spikes: 0.05, ..USUAL }, ..World::new(0.5, 3, drift) }, 3600.0),
        2 => (
            World { noise: Noise { sigma: 0.15, spikes: 0.03, pause: 5.0, ..USUAL }, ..World::new(5.0, 3, drift) },
            3600.0,
        ),
        3 => (World { noise: USUAL, ..World::new(10.0, 3, drift) }, 3600.0),
        4 => {
            let slow = |t: f64| t >= 200.0 && (t - 200.0) % 400.0 < 150.0;
            (World::new(0.5, 3, move |w, t| if w == 1 && slow(t) { 0.5 } else { 1.0 }), 3000.0)
        }
        6 => {
            let mut dice = Dice::new(seed + 77);
            let mut edges = vec![0.0f64];
            while *edges.last().unwrap() < 3600.0 {
                let next = edges.last().unwrap() + 45.0 * (0.4 + 1.2 * dice.uniform());
                edges.push(next);
            }
            let speed = move |w: usize, t: f64| {
                let slow = edges.partition_point(|&e| e <= t) % 2 == 0;
                if w == 1 && slow { 0.6 } else { 1.0 }
            };
            (World::new(0.5, 3, speed), 3600.0)
        }
        _ => (World::new(2.0, 3, |w, t| if w == 1 && t >= 400.0 { 0.55 } else { 1.0 }), 800.0),
    };
    world.run(until, seed);
    let mut last = String::new();
    for r in &world.records {
        if r.decision.label() != last {
            last = r.decision.label().to_owned();
            println!("{:.1} {}", r.snapshot.time.0, r.decision);
            if last.starts_with("adopt") || last.starts_with("wait/better") || last.starts_with("wait/uns") {
                for w in &r.snapshot.workers {
                    if let Some(f) = &w.speed_forecast {
                        println!(
                            "    now {:.3} {} n {} mean {:?} up {:?}",
                            w.speed,
                            f.method,
                            f.n_values,
                            f.mean.iter().step_by(8).map(|m| (m * 100.0).round()).collect::<Vec<_>>(),
                            f.upper.iter().step_by(8).map(|m| (m * 100.0).round()).collect::<Vec<_>>()
                        );
                    }
                }
            }
        }
    }
}
