//! Recordings: written, read, cut short, replayed.

use super::world::*;
use crate::transition::*;

/// A slow-down that is answered, with every decision.
fn recording() -> Vec<Record> {
    let speed = |w: usize, t: f64| if w == 1 && t >= 150.0 { 0.6 } else { 1.0 };
    let world = World { keep_all: true, ..World::new(0.5, 3, speed) };
    let story = world.run(220.0, 1);
    assert_eq!(story.adopted().len(), 1, "{}", story.told());
    story.records
}

/// Every moment's step with what comes of it under these settings.
fn replayed(records: &[Record], changes: &[(&str, &str)]) -> Vec<(u64, Replayed)> {
    let changes = changes.iter().map(|&(field, value)| (field.to_owned(), value.to_owned()));
    let mut replay = Replay::new(changes.collect()).unwrap();
    records.iter().map(|r| (r.snapshot.step, replay.again(r).unwrap())).collect()
}

fn adopts(replayed: &[(u64, Replayed)]) -> bool {
    replayed.iter().any(|(_, r)| matches!(r.decision, Decision::Adopt { .. }))
}

#[test]
fn a_record_survives_its_line_and_a_cut_line_is_recognised() {
    let records = recording();
    let adopted = records.iter().find(|r| r.decision.label() == "adopt").unwrap();
    let line = adopted.to_line().unwrap();
    assert!(!line.contains('\n'));
    assert_eq!(&Record::parse(line.as_bytes()).unwrap(), adopted);
    for end in (0..line.len()).step_by(97) {
        let error = Record::parse(&line.as_bytes()[..end]).unwrap_err();
        assert!(matches!(error, RecordError::CutShort), "after {end} bytes: {error}");
    }
    let newer = line.replacen("\"format\":1", "\"format\":7", 1);
    assert!(matches!(Record::parse(newer.as_bytes()), Err(RecordError::Format { found: 7 })));
    assert!(matches!(Record::parse(b"{\"format\":1}"), Err(RecordError::Malformed(_))));
}

#[test]
fn without_a_change_every_decision_is_the_recorded_one() {
    let lines: Vec<String> = recording().iter().map(|r| r.to_line().unwrap()).collect();
    let read: Vec<Record> = lines.iter().map(|line| Record::parse(line.as_bytes()).unwrap()).collect();
    for (record, (step, again)) in read.iter().zip(replayed(&read, &[])) {
        assert_eq!(again.decision, record.decision, "step {step}");
        assert_eq!((again.differs, again.ground), (false, Ground::Seen));
    }
}

#[test]
fn a_setting_that_would_not_have_moved_leaves_the_rest_supposed() {
    let records = recording();
    let step = records.iter().find(|r| r.decision.label() == "adopt").unwrap().snapshot.step;
    let replayed = replayed(&records, &[("threshold", "5")]);
    assert!(!adopts(&replayed));
    for (at, again) in &replayed {
        let ground = if *at <= step { Ground::Seen } else { Ground::Supposed { since_step: step } };
        assert_eq!(again.ground, ground, "step {at}");
    }
}

#[test]
fn a_longer_dwell_time_moves_later_with_the_recorded_answer() {
    let records = recording();
    let step = records.iter().find(|r| r.decision.label() == "adopt").unwrap().snapshot.step;
    // The recording ends with the adopted plan; seen before that is only what happened until then.
    let replayed = replayed(&records, &[("dwell", "60")]);
    assert!(!adopts(&replayed));
    assert!(replayed.iter().any(|(_, r)| r.ground == Ground::Supposed { since_step: step }));
}

#[test]
fn a_plan_nobody_asked_for_is_not_made_up() {
    // Recorded with a threshold that nothing reached.
    let speed = |w: usize, t: f64| if w == 1 && t >= 150.0 { 0.6 } else { 1.0 };
    let mut world = World { keep_all: true, ..World::new(0.5, 3, speed) };
    world.settings.threshold = 5.0;
    let records = world.run(220.0, 1).records;
    let replayed = replayed(&records, &[("threshold", "0.15")]);
    let (step, first) =
        replayed.iter().find(|(_, r)| r.decision.label() == "wait/unsolved").expect("it would have asked");
    assert_eq!(first.ground, Ground::Seen);
    assert!(!adopts(&replayed));
    assert_eq!(replayed.last().unwrap().1.ground, Ground::Supposed { since_step: *step });
}
