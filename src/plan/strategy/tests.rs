//! Small problems against all their choices.

use super::elimination::Eliminator;
use super::field::Field;
use super::reduce::Reduced;
use super::relaxation::Relaxation;
use super::state::State;
use super::*;
use crate::plan::random::Random;

/// A random problem that can be enumerated; `tight`: how much of the memory range the limit leaves.
fn problem(random: &mut Random, n_ops: usize, tight: f64) -> Problem {
    let mut ops = Vec::new();
    for _ in 0..n_ops {
        let n = 1 + random.below(3);
        let start = random.below(6) as i64;
        let cost = (0..n).map(|_| if random.below(12) == 0 { FORBIDDEN } else { random.below(30) as i64 - 5 });
        let cost = cost.collect();
        let usage = (0..n).map(|_| random.below(10) as i64).collect();
        ops.push(Op { cost, usage, live: start..start + random.below(4) as i64 });
    }
    let mut couplings = Vec::new();
    for _ in 0..n_ops + random.below(n_ops) {
        let pair = [random.below(n_ops), random.below(n_ops)];
        let [rows, columns] = pair.map(|op| ops[op].cost.len());
        // Now and then two ops of the same size have to agree.
        let alike = rows == columns && random.below(4) == 0;
        let cost = (0..rows * columns)
            .map(|i| match alike {
                true if i / columns != i % columns => FORBIDDEN,
                _ if random.below(8) == 0 => FORBIDDEN,
                _ => random.below(40) as i64,
            })
            .collect();
        couplings.push(Coupling { ops: pair, cost });
    }
    let most: i64 = ops.iter().map(|o| o.usage.iter().max().unwrap()).sum();
    Problem { ops, couplings, limit: (most as f64 * tight) as i64 }
}

/// Cost of a choice; `None` when it does not fit or has something forbidden.
fn cost(problem: &Problem, strategies: &[u32]) -> Option<i64> {
    let chosen = |op: usize| strategies[op] as usize;
    let own = problem.ops.iter().enumerate().map(|(op, o)| o.cost[chosen(op)]);
    let coupled = problem.couplings.iter().map(|c| {
        let [a, b] = c.ops;
        c.cost[chosen(a) * problem.ops[b].cost.len() + chosen(b)]
    });
    let costs: Vec<i64> = own.chain(coupled).collect();
    let used = |moment: i64| -> i64 {
        let live = problem.ops.iter().enumerate().filter(|(_, o)| o.live.contains(&moment));
        live.map(|(op, o)| o.usage[chosen(op)]).sum()
    };
    let fits = (0..12).all(|moment| used(moment) <= problem.limit);
    (fits && costs.iter().all(|&c| c < FORBIDDEN)).then(|| costs.iter().sum())
}

/// Every choice of one of `sizes[i]` values each.
fn all(sizes: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    let n: usize = sizes.iter().product();
    (0..n).map(move |mut i| {
        let digit = |&s: &usize| {
            let d = i % s;
            i /= s;
            d
        };
        sizes.iter().map(digit).collect()
    })
}

fn optimum(problem: &Problem) -> Option<i64> {
    let sizes: Vec<usize> = problem.ops.iter().map(|o| o.cost.len()).collect();
    all(&sizes).filter_map(|c| cost(problem, &c.iter().map(|&a| a as u32).collect::<Vec<_>>())).min()
}

/// Says stop when asked for the n-th time.
fn after(n: usize) -> impl FnMut() -> bool {
    let mut asked = 0;
    move || {
        asked += 1;
        asked > n
    }
}

#[test]
fn finds_the_optimum_of_small_problems_and_no_bound_above_it() {
    let mut random = Random::new(7);
    let (mut n_feasible, mut n_proven, mut n_refused) = (0, 0, 0);
    for i in 0..400 {
        let problem = problem(&mut random, 2 + i % 6, [0.9, 0.5, 0.35][i % 3]);
        let optimum = optimum(&problem);
        match solve(&problem, i as u64, &mut after(60)) {
            Ok(outcome) => {
                assert_eq!(outcome.strategies.as_ref().and_then(|s| cost(&problem, s)), optimum, "problem {i}");
                if let Some(optimum) = optimum {
                    assert!(outcome.bound <= optimum as f64, "problem {i}: {} > {optimum}", outcome.bound);
                    assert_eq!(outcome.cost, optimum as f64);
                    n_feasible += 1;
                    n_proven += usize::from(outcome.bound == outcome.cost);
                }
            }
            Err(refusal) => {
                assert_eq!(optimum, None, "problem {i}: {refusal}");
                n_refused += 1;
            }
        }
    }
    assert!(n_feasible > 100 && n_refused > 50 && n_proven > 80, "{n_feasible} {n_refused} {n_proven}");
}

#[test]
fn reduction_keeps_the_optimum() {
    let mut random = Random::new(3);
    let mut n_smaller = 0;
    for i in 0..400 {
        let problem = problem(&mut random, 2 + i % 6, 0.5);
        let (network, moments, limit) = problem.network();
        let mut reduced = Reduced::new(network, vec![limit; moments.len()]);
        let found = match reduced.reduce(&mut || false) {
            Err(_) => None,
            Ok(()) => {
                let sizes: Vec<usize> = reduced.network.variables.iter().map(|v| v.n_values().max(1)).collect();
                n_smaller += usize::from(sizes.iter().filter(|s| **s > 1).count() < problem.ops.len());
                all(&sizes).filter_map(|values| cost(&problem, &reduced.expand(|x| values[x]))).min()
            }
        };
        assert_eq!(found, optimum(&problem), "problem {i}");
    }
    assert!(n_smaller > 100);
}

/// The field of a problem without any reduction.
fn field(problem: &Problem) -> Field {
    let (network, moments, limit) = problem.network();
    Field::new(&Reduced::new(network, vec![limit; moments.len()]))
}

/// Without forbidden strategies, which reduction would have removed.
fn allowed(mut problem: Problem) -> Problem {
    problem.ops.iter_mut().flat_map(|o| &mut o.cost).for_each(|c| *c %= FORBIDDEN);
    problem.couplings.retain(|c| c.ops[0] != c.ops[1]);
    problem
}

#[test]
fn elimination_is_exact_whatever_is_left_out() {
    let mut random = Random::new(11);
    for i in 0..200 {
        let problem = allowed(problem(&mut random, 6, 1.0));
        let field = field(&problem).softened(1e4);
        let sizes: Vec<usize> = (0..field.n()).map(|x| field.n_values(x)).collect();
        let start: Vec<usize> = sizes.iter().map(|&s| random.below(s)).collect();
        let everything: Vec<usize> = (0..field.n()).collect();
        let mut eliminator = Eliminator::new(field.n());
        let order = eliminator.order(&field, &everything, [2, 6, 20, 1000][i % 4], &mut random);
        let mut values = start.clone();
        eliminator.minimise(&field, &field.cost, &order, &mut values);
        let kept = |x: &usize| !order.variables.contains(x);
        let same = |v: &Vec<usize>| everything.iter().filter(|x| kept(x)).all(|&x| v[x] == start[x]);
        let least = all(&sizes).filter(same).map(|v| field.cost_of(&v)).fold(f64::INFINITY, f64::min);
        assert_eq!(field.cost_of(&values), least, "problem {i}");
        assert!(same(&values));
    }
}

#[test]
fn no_choice_with_a_value_is_cheaper_than_bound_and_excess_say() {
    let mut random = Random::new(5);
    for i in 0..150 {
        let problem = allowed(problem(&mut random, 5, 0.5));
        let mut field = field(&problem);
        // Forbidden pairs may leave a value without partner, which reduction would have removed.
        field.tables.iter_mut().for_each(|c| *c = c.min(1e3));
        let mut relaxation = Relaxation::new(&field, vec![0.0; field.room.len()], None);
        relaxation.ascend(60, 0.0, &mut || false);
        let (bound, excess) = relaxation.excess();
        let sizes: Vec<usize> = (0..field.n()).map(|x| field.n_values(x)).collect();
        for values in all(&sizes).filter(|v| state::fits(&field.load_of(v), &field.room)) {
            for (x, &a) in values.iter().enumerate() {
                let least = bound + excess[field.first[x] + a];
                assert!(field.cost_of(&values) >= least - 1e-6, "problem {i}: {values:?} below {least}");
            }
        }
    }
}

#[test]
fn trees_are_bounded_exactly() {
    let mut random = Random::new(13);
    for i in 0..50 {
        let mut problem = allowed(problem(&mut random, 6, 1.0));
        // Each op coupled with one before.
        problem.couplings = (1..6)
            .map(|op| {
                let ops = [random.below(op), op];
                let n = ops.map(|o| problem.ops[o].cost.len()).iter().product();
                Coupling { ops, cost: (0..n).map(|_| random.below(50) as i64).collect() }
            })
            .collect();
        let field = field(&problem);
        let mut relaxation = Relaxation::new(&field, vec![0.0; field.room.len()], None);
        relaxation.ascend(10, 0.0, &mut || false);
        assert_eq!(Some(relaxation.excess().0.round() as i64), optimum(&problem), "problem {i}");
    }
}

#[test]
fn what_is_taken_over_fits_saves_and_adds_up() {
    let mut random = Random::new(17);
    let mut n_better = 0;
    for i in 0..300 {
        let problem = allowed(problem(&mut random, 7, 0.4));
        let field = field(&problem).softened(100.0);
        let sizes: Vec<usize> = (0..field.n()).map(|x| field.n_values(x)).collect();
        let mut any = || -> Vec<usize> { sizes.iter().map(|&s| random.below(s)).collect() };
        let (values, proposal) = (any(), any());
        let load = field.load_of(&values);
        if !state::fits(&load, &field.room) {
            continue;
        }
        let mut state = State { cost: field.cost_of(&values), values, load };
        let before = state.cost;
        let changed: Vec<usize> = (0..field.n()).collect();
        let better = state.improve(&field, &proposal, &changed, &mut random);
        assert_eq!(state.cost, field.cost_of(&state.values), "problem {i}");
        assert_eq!(state.load, field.load_of(&state.values), "problem {i}");
        assert!(state::fits(&state.load, &field.room) && state.cost <= before, "problem {i}");
        assert_eq!(better, state.cost < before);
        let whole = field.cost_of(&proposal);
        if state::fits(&field.load_of(&proposal), &field.room) {
            assert!(state.cost <= whole, "problem {i}: the whole proposal fits and is cheaper");
        }
        n_better += usize::from(better);
    }
    assert!(n_better > 50);
}

#[test]
fn the_same_question_gets_the_same_answer() {
    let mut random = Random::new(23);
    let problem = problem(&mut random, 40, 0.4);
    let answer = |seed| solve(&problem, seed, &mut after(200)).map(|o| (o.strategies, o.cost, o.bound, o.turns));
    assert_eq!(answer(1), answer(1));
}

#[test]
fn numbers_at_the_end_of_their_range_neither_overflow_nor_win() {
    let large = FORBIDDEN - 1;
    let op = |cost: Vec<i64>, usage: Vec<i64>| Op { cost, usage, live: 0..i64::MAX };
    let problem = Problem {
        ops: vec![op(vec![large, 0], vec![0, i64::MAX]); 12],
        couplings: (1..12)
            .map(|i| Coupling { ops: [i - 1, i], cost: vec![large, i64::MAX, FORBIDDEN, large] })
            .collect(),
        limit: i64::MAX - 1,
    };
    // All have to take the strategy without memory: twelve times its cost and eleven times that of the couplings.
    let outcome = solve(&problem, 1, &mut after(50)).unwrap();
    assert_eq!(outcome.strategies, Some(vec![0; 12]));
    assert!((outcome.cost / (23.0 * large as f64) - 1.0).abs() < 1e-12);
}

#[test]
fn refusals_say_why() {
    let op = |usage: i64| Op { cost: vec![0], usage: vec![usage], live: 3..5 };
    let problem = Problem { ops: vec![op(4), op(5)], couplings: Vec::new(), limit: 8 };
    let refusal = solve(&problem, 1, &mut || false).unwrap_err();
    assert_eq!(refusal, Refusal::Memory { moment: 3, needs: 9.0, limit: 8.0 });
    assert_eq!(refusal.to_string(), "at moment 3 the leanest strategies use 9, the limit is 8");
    let forbidden = Coupling { ops: [0, 1], cost: vec![FORBIDDEN] };
    let problem = Problem { couplings: vec![forbidden], limit: 9, ..problem };
    assert!(matches!(solve(&problem, 1, &mut || false), Err(Refusal::Forbidden { .. })));
    assert_eq!(
        solve(&Problem { ops: vec![], couplings: vec![], limit: 0 }, 1, &mut || false).unwrap().strategies,
        Some(vec![])
    );
}
