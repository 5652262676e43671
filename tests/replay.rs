//! `foreshard replay`: decisions of a run under other settings.

mod support;

use std::fs;
use std::process::Output;

use foreshard::forecast::Robust;
use foreshard::plan::ShardId;
use foreshard::transition::{
    Candidate, Memory, Observed, Proposal, Record, Running, Settings, Snapshot, Window, Worker, decide,
};
use foreshard::units::{Bytes, Seconds};

/// Three moments: all is well; steps are slower; a plan is offered and adopted.
fn lines() -> Vec<String> {
    let level = |centre: f64| Observed {
        windows: vec![Window { span: Seconds(18.0), seen: Robust { centre, spread: 0.02, n: 18 } }],
    };
    let worker = Worker {
        rank: 0,
        shard: ShardId(0),
        predicted_busy: Seconds(1.0),
        busy: level(1.0),
        speed: 1.0,
        speed_forecast: None,
        memory: Memory { planned: Bytes(1), used: Bytes(1), limit: Bytes(9), forecast: None },
    };
    let candidate = Candidate {
        revision: 2,
        made: Seconds(102.0),
        interval: Seconds(300.0),
        running: vec![Seconds(1.5)],
        step_times: vec![Seconds(1.2)],
        memory: vec![Bytes(1)],
        bytes_to_move: Bytes(0),
        pause: Seconds(1.0),
        prepare: Seconds(5.0),
    };
    let moment = |step: u64, step_time: f64, proposal: Option<Proposal>| {
        let snapshot = Snapshot {
            step,
            time: Seconds(step as f64),
            steps_left: None,
            settings: Settings::default(),
            running: Running {
                revision: 1,
                since_step: 0,
                since: Seconds(0.0),
                predicted: Seconds(1.0),
                observed: level(step_time),
            },
            workers: vec![worker.clone()],
            proposal,
            moves: vec![],
            in_flight: None,
            considered: None,
            approved: None,
        };
        let decision = decide(&snapshot);
        Record::new(snapshot, decision).to_line().unwrap()
    };
    vec![moment(100, 1.0, None), moment(101, 1.5, None), moment(102, 1.5, Some(Proposal::Plans(vec![candidate])))]
}

fn replay(text: &str, more: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("decisions.jsonl"), text).unwrap();
    support::foreshard().arg("replay").arg(directory.path()).args(more).output().unwrap()
}

fn out(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn shows_what_was_decided_and_what_other_settings_would_decide() {
    let recording = lines().join("\n") + "\n";
    let (code, stdout, stderr) = out(&replay(&recording, &[]));
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let decisions: Vec<&str> = stdout.lines().take(3).filter_map(|l| l.split(" s  ").nth(1)).collect();
    assert_eq!(decisions[0], "keep: nothing new");
    assert!(decisions[1].starts_with("wait: the planner is at work"), "{stdout}");
    assert!(decisions[2].starts_with("adopt revision 2, which saves"), "{stdout}");
    assert!(!stdout.contains("[recorded:"), "{stdout}");

    let (code, stdout, _) = out(&replay(&recording, &["--set", "adaptation.minGain=0.5"]));
    assert_eq!(code, Some(0));
    assert!(stdout.contains("the least gain is 50.0 %") && stdout.contains("[recorded: adopt revision 2"), "{stdout}");

    let (_, stdout, _) = out(&replay(&recording, &["--set", "adaptation.mode=off", "--json"]));
    let first: serde_json::Value = serde_json::from_str(stdout.lines().next().unwrap()).unwrap();
    assert_eq!(first["decision"]["keep"]["reason"], "off");
}

#[test]
fn a_recording_that_was_cut_short_is_replayed_as_far_as_it_goes() {
    let recording = lines().join("\n");
    let (code, stdout, stderr) = out(&replay(&recording[..recording.len() - 40], &[]));
    assert_eq!(code, Some(2));
    assert!(stdout.contains("wait: the planner is at work"), "{stdout}");
    assert!(stderr.contains("line 3: the record is cut short; the last good line is 2"), "{stderr}");

    for (text, says) in [("", "holds no decisions"), ("{\"step\":1}\n", "line 1: not a record of decisions")] {
        let (code, _, stderr) = out(&replay(text, &[]));
        assert_eq!(code, Some(2));
        assert!(stderr.contains(says), "{stderr}");
    }
    let missing = support::foreshard().args(["replay", "/nonexistent"]).output().unwrap();
    assert!(out(&missing).2.contains("decisions.jsonl"), "{missing:?}");
}

#[test]
fn a_setting_that_is_none_is_named() {
    let recording = lines().join("\n");
    for (setting, says) in [
        ("adaptation.treshold=1", "did you mean \"threshold\"?"),
        ("adaptation.threshold=0", "adaptation.threshold: 0, must be 0.01 to 10"),
        ("adaptation.threshold", "write SETTING=VALUE"),
        ("threshold=1", "settings are named adaptation.threshold"),
    ] {
        let (code, _, stderr) = out(&replay(&recording, &["--set", setting]));
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(says), "{setting}: {stderr}");
    }
}
