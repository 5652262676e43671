//! Devices whose truth is known: do their reports tell it?

use super::*;

const TRUTH: Measured = Measured { product: 0.4, memory: 1.6, other: 1.0, launch: 2.0 };

/// A device with true factors, whose reports are noisy.
struct Device {
    id: DeviceId,
    segments: Vec<Timed>,
    noise: u64,
}

impl Device {
    /// `cut` gives the segments of one plan other terms than those of another.
    fn new(id: u32, cut: u32) -> Self {
        // Each class dominates one segment.
        let at = |i: u32, k: u32| {
            if (i + cut) % 4 == k { Seconds(1e-3) } else { Seconds(3e-5 * f64::from((i + 2 * k + cut) % 7)) }
        };
        let terms = |i| Terms::from_array([at(i, 0), at(i, 1), at(i, 2), at(i, 3) * 0.1]);
        let segments = (0..4).map(|i| Timed { terms: terms(i), runs: if i < 3 { 4 } else { 1 } }).collect();
        Self { id: DeviceId(id), segments, noise: 1 + u64::from(id) }
    }

    /// Relative, within ±5 %, now and then far off.
    fn noise(&mut self) -> f64 {
        self.noise = self.noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let uniform = (self.noise >> 40) as f64 / (1u64 << 24) as f64;
        if uniform > 0.97 { 2.0 } else { 0.1 * (uniform - 0.5) }
    }

    /// One step at a speed, with factors per segment on top.
    fn step(&mut self, speed: f64, extra: &[f64]) -> Vec<f32> {
        let segments = self.segments.clone();
        let times = segments.iter().enumerate().map(|(i, timed)| {
            let seconds = timed.time(&TRUTH).0 / speed * (1.0 + self.noise());
            (seconds * extra.get(i).copied().unwrap_or(1.0)) as f32
        });
        times.collect()
    }

    fn report<'a>(&'a self, seconds: &'a [f32]) -> Report<'a> {
        let (other, turn) = (Seconds(0.0), None);
        Report { device: self.id, kind: "cpu", segments: &self.segments, seconds, other, turn }
    }

    fn run(&mut self, calibration: &mut Calibration, steps: usize, speed: f64) -> Observed {
        let mut last = None;
        for _ in 0..steps {
            let seconds = self.step(speed, &[]);
            last = calibration.observe(&[self.report(&seconds)]).unwrap().pop();
        }
        last.unwrap()
    }
}

fn off(a: &Measured, b: &Measured) -> f64 {
    [(a.product, b.product), (a.memory, b.memory), (a.launch, b.launch)]
        .map(|(a, b)| (a / b - 1.0).abs())
        .into_iter()
        .fold(0.0, f64::max)
}

#[test]
fn finds_what_nominal_figures_are_off_by() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 60, 1.0);
    let summary = &calibration.summary()[0];
    assert!(summary.nominal_error > 0.3 && summary.error < 0.1, "{summary:?}");
    let found = calibration.measured(DeviceId(0), "cpu");
    assert!((found.product / TRUTH.product - 1.0).abs() < 0.15, "{found:?}");
    assert!((found.memory / TRUTH.memory - 1.0).abs() < 0.15, "{found:?}");
}

#[test]
fn a_wrong_model_is_no_slow_device() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0 / 3.0);
    let speed = calibration.speed_of(DeviceId(0));
    assert!((speed.value - 1.0).abs() < 0.05 && speed.samples == WINDOW as u32, "{speed:?}");
}

#[test]
fn a_device_at_half_speed_shows_as_such_and_teaches_nothing_about_ops() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0);
    let seen = device.run(&mut calibration, 1, 0.5);
    assert!((seen.speed.unwrap() - 0.5).abs() < 0.05, "{seen:?}");
    device.run(&mut calibration, 60, 0.5);
    let speed = calibration.speed_of(DeviceId(0));
    assert!((speed.value - 0.5).abs() < 0.025 && speed.spread < 0.05, "{speed:?}");
    let (mut twin, mut undisturbed) = (Device::new(0, 0), Calibration::default());
    twin.run(&mut undisturbed, 101, 1.0);
    let [found, expected] = [&calibration, &undisturbed].map(|c| c.measured(DeviceId(0), "cpu"));
    assert!(off(&found, &expected) < 0.001, "{found:?} {expected:?}");
    device.run(&mut calibration, 9, 1.0);
    assert!((calibration.speed(DeviceId(0)) - 1.0).abs() < 0.05);
}

#[test]
fn one_slow_segment_is_no_slow_device() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0);
    for _ in 0..20 {
        let seconds = device.step(1.0, &[1.0, 3.0]);
        calibration.observe(&[device.report(&seconds)]).unwrap();
    }
    let speed = calibration.speed(DeviceId(0));
    assert!((speed - 1.0).abs() < 0.05, "{speed}");
}

#[test]
fn a_new_plan_does_not_make_a_slow_device_fast() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0);
    device.run(&mut calibration, 20, 0.5);
    let seen = Device::new(0, 1).run(&mut calibration, 40, 0.5);
    let speed = calibration.speed(DeviceId(0));
    assert!((speed - 0.5).abs() < 0.03, "{speed}");
    assert!((seen.predicted / seen.measured - 1.0).abs() < 0.15, "{seen:?}");
    let (mut twin, mut undisturbed) = (Device::new(0, 0), Calibration::default());
    twin.run(&mut undisturbed, 60, 1.0);
    Device::new(0, 1).run(&mut undisturbed, 40, 1.0);
    let [found, expected] = [&calibration, &undisturbed].map(|c| c.measured(DeviceId(0), "cpu"));
    assert!(off(&found, &expected) < 0.05, "{found:?} {expected:?}");
}

#[test]
fn a_device_that_has_changed_on_the_way_to_a_new_plan_is_seen_by_its_factors() {
    for (slow, after) in [(0.5, 1.0), (1.0, 0.5)] {
        let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
        device.run(&mut calibration, 40, 1.0);
        device.run(&mut calibration, 20, slow);
        Device::new(0, 1).run(&mut calibration, 40, after);
        let speed = calibration.speed(DeviceId(0));
        assert!((speed / after - 1.0).abs() < 0.12, "{slow} {after}: {speed}");
    }
}

#[test]
fn a_small_segment_that_is_known_does_not_speak_for_all() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    let small = Timed { terms: Terms::from_array([Seconds(0.0), Seconds(1e-6), Seconds(0.0), Seconds(0.0)]), runs: 1 };
    device.segments.push(small);
    device.run(&mut calibration, 40, 1.0);
    let mut recut = Device::new(0, 1);
    recut.segments.push(small);
    for _ in 0..20 {
        let seconds = recut.step(1.0, &[1.0, 1.0, 1.0, 1.0, 3.0]);
        calibration.observe(&[recut.report(&seconds)]).unwrap();
    }
    let speed = calibration.speed(DeviceId(0));
    assert!((speed - 1.0).abs() < 0.05, "{speed}");
}

#[test]
fn what_is_learned_of_one_device_is_a_first_guess_for_its_kind() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 60, 1.0);
    let known = calibration.measured(DeviceId(0), "cpu");
    assert!(off(&calibration.measured(DeviceId(7), "cpu"), &known) < 0.1);
    assert_eq!(calibration.measured(DeviceId(7), "nvidia.com/gpu"), Measured::NOMINAL);
    let topology = calibration.correct(crate::topology::parse_devices("2xcpu,gpu").unwrap());
    let measured: Vec<bool> = topology.devices.iter().map(|d| d.measured.is_some()).collect();
    assert_eq!(measured, [true, true, false]);
    assert!(topology.devices.iter().all(|d| d.speed == 1.0));
}

#[test]
fn each_device_keeps_figures_of_its_own() {
    let (mut fast, mut slow) = (Device::new(0, 0), Device::new(1, 0));
    let mut calibration = Calibration::default();
    for _ in 0..60 {
        let (a, b) = (fast.step(1.0, &[]), slow.step(0.5, &[]));
        calibration.observe(&[fast.report(&a), slow.report(&b)]).unwrap();
    }
    let [a, b] = [0, 1].map(|d| calibration.measured(DeviceId(d), "cpu"));
    assert!(b.product / a.product > 1.6, "{a:?} {b:?}");
    assert!(calibration.summary().iter().all(|w| w.error < 0.15 && (w.speed.value - 1.0).abs() < 0.05));
}

#[test]
fn cold_steps_leave_no_trace() {
    let (mut warm, mut cold) = (Device::new(0, 0), Device::new(0, 0));
    let mut expected = Calibration::default();
    let mut calibration = Calibration::default();
    warm.run(&mut expected, 2, 1.0);
    cold.run(&mut calibration, 2, 0.01);
    warm.run(&mut expected, 20, 1.0);
    cold.run(&mut calibration, 20, 1.0);
    assert_eq!(calibration.summary(), expected.summary());
}

#[test]
fn another_process_on_a_device_starts_at_full_speed() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0);
    device.run(&mut calibration, 20, 0.5);
    let before = calibration.measured(DeviceId(0), "cpu");
    calibration.replaced(DeviceId(0));
    assert_eq!(calibration.speed_of(DeviceId(0)), Speed { value: 1.0, spread: 0.0, samples: 0 });
    assert_eq!(calibration.measured(DeviceId(0), "cpu"), before);
}

#[test]
fn refuses_reports_that_measure_something_else() {
    let (mut device, mut calibration) = (Device::new(3, 0), Calibration::default());
    let mut seconds = device.step(1.0, &[]);
    seconds[2] = f32::NAN;
    let e = calibration.observe(&[device.report(&seconds)]).unwrap_err();
    assert!(e.to_string().contains("dev3 reports NaN s for segment 2"), "{e}");
    let e = calibration.observe(&[device.report(&seconds[..2])]).unwrap_err();
    assert_eq!(e, CalibrationError::Segments { device: DeviceId(3), expected: 4, found: 2 });
    assert_eq!(calibration.summary(), []);
}

#[test]
fn a_step_takes_what_its_segments_do_not_explain() {
    let mut calibration = Calibration::default();
    for _ in 0..60 {
        calibration.observe_step(1, Seconds(0.1), 0.0, Seconds(0.12));
    }
    assert!((calibration.stretch() - 1.2).abs() < 0.01);
    // A surprise stays one for a while.
    calibration.observe_step(1, Seconds(0.1), 0.0, Seconds(0.24));
    assert!((calibration.stretch() - 1.2).abs() < 0.04);
    let stretch = calibration.stretch();
    for useless in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
        calibration.observe_step(2, Seconds(useless), useless, Seconds(useless));
        calibration.observe_step(2, Seconds(0.1), 0.0, Seconds(useless));
    }
    assert_eq!((calibration.stretch(), calibration.lateness()), (stretch, Seconds(0.0)));
}

#[test]
fn now_and_then_belongs_to_what_a_step_takes() {
    let mut calibration = Calibration::default();
    for step in 0..2000 {
        let seconds = if step % 10 == 9 { 0.2 } else { 0.1 };
        calibration.observe_step(1, Seconds(0.1), 0.0, Seconds(seconds));
    }
    assert!((calibration.stretch() - 1.1).abs() < 0.03, "{}", calibration.stretch());
}

#[test]
fn what_messages_take_is_told_from_what_all_takes() {
    let check = |late: f64, share: f64| {
        let mut calibration = Calibration::default();
        for step in 0..200 {
            let noise = 1.0 + 0.01 * f64::from(step % 7 - 3);
            // Five messages, one after the other, each later than its link's figures say.
            let explained = Seconds(2e-3 + 5.0 * (60e-6 + calibration.lateness().0));
            let measured = Seconds((2e-3 + 5.0 * (60e-6 + late)) * share * noise);
            calibration.observe_step(1, explained, 5.0, measured);
        }
        (calibration.lateness().0, calibration.stretch())
    };
    for late in [100e-6, 5e-6, -20e-6, 1e-3] {
        let (found, stretch) = check(late, 1.0);
        assert!((found - late).abs() < 10e-6 + 0.1 * late.abs(), "{found} for {late}");
        assert!((stretch - 1.0).abs() < 0.02, "{stretch}");
    }
    // Messages are not early for what takes less than was explained.
    let (found, stretch) = check(0.0, 0.5);
    assert!((found + 25e-6).abs() < 1e-6 && (stretch - 1.15 / 2.175).abs() < 0.02, "{found} {stretch}");
}

#[test]
fn a_device_that_slows_down_while_its_segments_change_is_still_known_to_be_slow() {
    let mut calibration = Calibration::default();
    let (mut a, mut b) = (Device::new(0, 0), Device::new(1, 1));
    let both = |calibration: &mut Calibration, a: &mut Device, b: &mut Device, speeds: (f64, f64), steps: usize| {
        for _ in 0..steps {
            let (x, y) = (a.step(speeds.0, &[]), b.step(speeds.1, &[]));
            calibration.observe(&[a.report(&x), b.report(&y)]).unwrap();
        }
    };
    both(&mut calibration, &mut a, &mut b, (1.0, 1.0), 40);
    // They change places, and at that moment one of them becomes slow.
    std::mem::swap(&mut a.segments, &mut b.segments);
    both(&mut calibration, &mut a, &mut b, (1.0, 0.5), 40);
    let (fast, slow) = (calibration.speed(DeviceId(0)), calibration.speed(DeviceId(1)));
    assert!((fast - 1.0).abs() < 0.1 && (slow - 0.5).abs() < 0.05, "{fast} and {slow}");
}

#[test]
fn a_worker_with_hardly_anything_to_do_shows_no_speed_and_is_not_slow_for_ever() {
    let mut calibration = Calibration::default();
    let (mut a, mut b) = (Device::new(0, 0), Device::new(1, 1));
    let speed = |calibration: &Calibration| calibration.speed(DeviceId(0));
    let mut both = |calibration: &mut Calibration, a: &mut Device, a_speed: f64, steps: usize| {
        for _ in 0..steps {
            let (x, y) = (a.step(a_speed, &[]), b.step(1.0, &[]));
            calibration.observe(&[a.report(&x), b.report(&y)]).unwrap();
        }
    };
    both(&mut calibration, &mut a, 1.0, 40);
    both(&mut calibration, &mut a, 0.5, 20);
    // Then all but a thousandth of its work goes elsewhere, and that takes ten times as long as anything says.
    let work = std::mem::take(&mut a.segments);
    let little = |timed: &Timed| Terms::from_array(timed.terms.to_array().map(|s| s * 1e-3));
    a.segments = work.iter().map(|timed| Timed { terms: little(timed), runs: 1 }).collect();
    both(&mut calibration, &mut a, 0.1, 10);
    assert!((0.45..0.65).contains(&speed(&calibration)), "{}", speed(&calibration));
    both(&mut calibration, &mut a, 0.1, 300);
    assert!(speed(&calibration) > 0.9, "{}", speed(&calibration));
    // It is slow after all.
    a.segments = work;
    both(&mut calibration, &mut a, 0.5, WINDOW);
    assert!((speed(&calibration) - 0.5).abs() < 0.05, "{}", speed(&calibration));
}

#[test]
fn a_segment_that_runs_takes_what_was_measured_of_it() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    for _ in 0..40 {
        // Alone among its kind: no factor explains it.
        let seconds = device.step(1.0, &[1.0, 3.0]);
        calibration.observe(&[device.report(&seconds)]).unwrap();
    }
    let expect = |calibration: &Calibration, device: &Device, extra: &[f64], tolerance: f64| {
        let found = calibration.times(device.id, "cpu", &device.segments);
        for (i, (found, timed)) in found.iter().zip(&device.segments).enumerate() {
            let truth = timed.terms.time(&TRUTH) * extra.get(i).copied().unwrap_or(1.0);
            assert!((*found / truth - 1.0).abs() < tolerance, "segment {i}: {found}, in truth {truth}");
        }
    };
    expect(&calibration, &device, &[1.0, 3.0], 0.05);
    // Another device of the kind that gets them.
    let other = Device { id: DeviceId(1), ..Device::new(0, 0) };
    expect(&calibration, &other, &[1.0, 3.0], 0.05);
}

#[test]
fn segments_that_are_new_take_what_factors_say() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    device.run(&mut calibration, 40, 1.0);
    let recut = Device::new(0, 1);
    let sum = |times: &[Seconds]| times.iter().copied().sum::<Seconds>();
    let found = sum(&calibration.times(recut.id, "cpu", &recut.segments));
    let truth = sum(&recut.segments.iter().map(|t| t.terms.time(&TRUTH)).collect::<Vec<_>>());
    assert!((found / truth - 1.0).abs() < 0.15, "{found}, in truth {truth}");
}

#[test]
fn what_a_worker_does_beside_executing_is_counted_by_run_and_by_step() {
    let (mut device, mut calibration) = (Device::new(0, 0), Calibration::default());
    assert_eq!(calibration.overhead(device.id, "cpu"), Overhead::default());
    for step in 0..60 {
        // Three segments run four times, one once. From the middle on everything takes twice as long.
        let slowed = if step < 30 { 1.0 } else { 2.0 };
        let seconds = device.step(1.0 / slowed, &[]);
        let (other, turn) = (Seconds(13.0 * 20e-6 * slowed), (step > 0).then_some(Seconds(50e-6 * slowed)));
        calibration.observe(&[Report { other, turn, ..device.report(&seconds) }]).unwrap();
    }
    for id in [0, 7] {
        let Overhead { task, step } = calibration.overhead(DeviceId(id), "cpu");
        assert!((task.0 / 20e-6 - 1.0).abs() < 0.05 && (step.0 / 50e-6 - 1.0).abs() < 0.05, "{task} {step}");
    }
    assert_eq!(calibration.overhead(DeviceId(7), "nvidia.com/gpu"), Overhead::default());
}

#[test]
fn the_parents_answer_is_learned_from_what_it_took() {
    let mut calibration = Calibration::default();
    assert_eq!(calibration.answer(), Seconds(0.0));
    // Nobody waited: it took less, by whatever.
    calibration.observe_answer(Seconds(9.0), false);
    assert_eq!(calibration.answer(), Seconds(0.0));
    for seconds in [9.0, 9.0, 1e-3, 1e-3, 1e-3, 9.0, 1e-3, f64::NAN, -1.0, f64::INFINITY] {
        calibration.observe_answer(Seconds(seconds), true);
    }
    assert_eq!(calibration.answer(), Seconds(1e-3));
    calibration.observe_answer(Seconds(9.0), false);
    assert!((calibration.answer().0 - 1e-3).abs() < 1e-9);
    for _ in 0..200 {
        calibration.observe_answer(Seconds(5e-4), false);
    }
    assert!((calibration.answer().0 - 5e-4).abs() < 5e-5);
}
