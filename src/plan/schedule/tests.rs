use super::*;

/// A pipeline of `n` shards, backward work twice the forward work, last stage's halves in one segment.
fn pipeline(n: usize, transfer: f64) -> TaskGraph {
    let mut nodes: Vec<Node> = Vec::new();
    for level in 0..2 * n - 1 {
        let (shard, duration) = match level {
            l if l < n - 1 => (l, 1.0),
            l if l == n - 1 => (l, 3.0),
            l => (2 * (n - 1) - l, 2.0),
        };
        let mut needs = Vec::new();
        let need = |segment, transfer| Need { segment, message: None, transfer: Seconds(transfer), flow: None };
        if level > 0 {
            needs.push(need(level - 1, transfer));
        }
        if level >= n {
            needs.push(need(2 * (n - 1) - level, 0.0));
        }
        nodes.push(Node { shard: ShardId(shard as u32), level: level as u32, duration: Seconds(duration), needs });
    }
    TaskGraph { n_shards: n, flows: vec![Vec::new(); nodes.len()], nodes }
}

#[test]
fn takes_the_textbook_time_on_an_even_pipeline() {
    for (n, m) in [(1, 1), (1, 4), (2, 8), (4, 8), (4, 4)] {
        for kind in [ScheduleKind::GPipe, ScheduleKind::OneFOneB] {
            let tasks = pipeline(n, 0.0);
            let schedule = tasks.schedule(kind, m);
            // (m + n - 1) · (forward + backward)
            assert_eq!(schedule.makespan.0, 3.0 * (m as f64 + n as f64 - 1.0), "{kind:?} {n} {m}");
            let lanes = tasks.replay(&schedule.orders, m).unwrap();
            let end = lanes.iter().flatten().map(|s| s.end.0).fold(0.0, f64::max);
            assert_eq!(end, schedule.makespan.0);
        }
    }
}

/// A pipeline of `n` shards that the model goes through in so many rounds; forward, gradients of inputs and gradients of
/// params take one unit each on a shard.
fn finer(n: usize, rounds: usize, apart: bool) -> TaskGraph {
    let (stages, unit) = (n * rounds, 1.0 / rounds as f64);
    let mut nodes: Vec<Node> = Vec::new();
    let mut push = |stage: usize, level: usize, late: bool, duration: f64, needs: &[usize]| {
        let level = if apart { 2 * level + usize::from(late) } else { level } as u32;
        let need = |&segment| Need { segment, message: None, transfer: Seconds(0.0), flow: None };
        let needs = needs.iter().map(need).collect();
        nodes.push(Node { shard: ShardId((stage % n) as u32), level, duration: Seconds(duration * unit), needs });
        nodes.len() - 1
    };
    let mut before: Vec<usize> = Vec::new();
    let mut forward = vec![0; stages];
    for (stage, at) in forward.iter_mut().enumerate().take(stages - 1) {
        *at = push(stage, stage, false, 1.0, &before);
        before = vec![*at];
    }
    for level in stages - 1..2 * stages - 1 {
        let stage = 2 * (stages - 1) - level;
        let mut needs = before.clone();
        let turns = stage == stages - 1;
        if !turns {
            needs.push(forward[stage]);
        }
        let own = if turns { 2.0 } else { 1.0 };
        let at = push(stage, level, false, if apart { own } else { own + 1.0 }, &needs);
        if apart {
            push(stage, level, true, 1.0, &[at]);
        }
        before = vec![at];
    }
    TaskGraph { n_shards: n, flows: vec![Vec::new(); nodes.len()], nodes }
}

#[test]
fn fills_the_pipeline_sooner_in_rounds_and_with_what_can_wait() {
    for (n, m) in [(2usize, 8u32), (4, 8), (4, 16), (8, 16)] {
        let makespan = |kind: ScheduleKind, rounds| {
            let tasks = finer(n, rounds, kind.sets_apart());
            let schedule = tasks.schedule(kind, m);
            tasks.replay(&schedule.orders, m).unwrap();
            schedule.makespan.0
        };
        let (work, bubble) = (3.0 * f64::from(m), n as f64 - 1.0);
        // What Narayanan et al. and Qi et al. give for them: (n - 1) times 3, 3 / rounds, 1.
        assert_eq!(makespan(ScheduleKind::OneFOneB, 1), work + 3.0 * bubble, "{n} {m}");
        for rounds in [2, 4] {
            let interleaved = makespan(ScheduleKind::Interleaved, rounds);
            let expected = work + 3.0 * bubble / rounds as f64;
            assert!((interleaved - expected).abs() < 1e-9, "{n} {m} {rounds}: {interleaved}");
        }
        let zero_bubble = makespan(ScheduleKind::ZeroBubble, 1);
        assert!((zero_bubble - work - bubble).abs() < 1e-9, "{n} {m}: {zero_bubble}");
    }
}

#[test]
fn bounds_the_microbatches_in_flight_by_the_depth() {
    let tasks = pipeline(4, 0.0);
    assert_eq!(tasks.schedule(ScheduleKind::OneFOneB, 16).in_flight, [4, 3, 2, 1]);
    assert_eq!(tasks.schedule(ScheduleKind::GPipe, 16).in_flight[0], 16);
}

#[test]
fn hides_transfers_behind_one_more_microbatch() {
    let (near, far) = (pipeline(2, 0.0), pipeline(2, 0.4));
    let (near, far) = (near.schedule(ScheduleKind::OneFOneB, 16), far.schedule(ScheduleKind::OneFOneB, 16));
    assert!(far.makespan.0 < near.makespan.0 + 4.0, "{:?}", far.makespan);
}

#[test]
fn steps_that_follow_each_other_overlap_where_they_can() {
    let check = |n: usize, shards: &[f64], together: bool, answer: f64, expected: f64| {
        let tasks = pipeline(n, 0.0);
        let orders = tasks.schedule(ScheduleKind::OneFOneB, 4).orders;
        let shards: Vec<Seconds> = shards.iter().map(|&s| Seconds(s)).collect();
        let between = Between { shards: &shards, together, answer: Seconds(answer) };
        let period = tasks.period(&orders, 4, &between).unwrap().0;
        assert!((period - expected).abs() < 1e-9, "{n} {shards:?} {together} {answer}: {period}");
    };
    // Alone a step of two shards takes 3 · (4 + 1).
    check(2, &[0.0, 0.0], false, 0.0, 15.0);
    // The second shard has updated its params while the first one ends the step.
    check(2, &[0.0, 2.0], false, 0.0, 15.0);
    check(2, &[1.0, 2.0], false, 0.0, 16.0);
    check(2, &[0.0, 4.0], false, 0.0, 16.0);
    // Updates that wait for each other end together.
    check(2, &[1.0, 4.0], true, 0.0, 17.0);
    // Two steps are under way: an answer counts where it takes longer than one of them.
    check(1, &[0.0], false, 11.0, 12.0);
    check(1, &[0.0], false, 20.0, 16.0);
}

#[test]
fn messages_may_be_later_than_their_links_say() {
    let makespan = |late: f64| {
        let tasks = pipeline(2, 0.5);
        let durations = tasks.nodes.iter().map(|n| n.duration).collect::<Vec<_>>();
        tasks.with_times(durations.into_iter(), Seconds(late)).schedule(ScheduleKind::GPipe, 1).makespan.0
    };
    // There and back; what stays on the shard comes at once.
    assert_eq!([makespan(0.0), makespan(0.25), makespan(-9.0)], [7.0, 7.5, 6.0]);
}

#[test]
fn tells_a_deadlock_from_a_schedule() {
    let tasks = pipeline(2, 0.0);
    let t = |segment, microbatch| Task { segment, microbatch };
    let backward_first = vec![vec![t(2, 0), t(0, 0)], vec![t(1, 0)]];
    assert!(matches!(tasks.replay(&backward_first, 1), Err(ScheduleError::Deadlock { .. })));
    let missing = vec![vec![t(0, 0)], vec![t(1, 0)]];
    assert!(matches!(tasks.replay(&missing, 1), Err(ScheduleError::WrongTasks { .. })));
    let swapped = vec![vec![t(0, 1), t(0, 0), t(2, 0), t(2, 1)], vec![t(1, 0), t(1, 1)]];
    assert!(matches!(tasks.replay(&swapped, 2), Err(ScheduleError::OutOfTurn { .. })));
}
