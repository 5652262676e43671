//! An explanation in plain words.

use std::fmt;

use super::{Alternative, Choice, Constraint, Explanation, LEAST_GAIN, More, Resource, Share, Short, Spared};
use crate::plan::memory::Memory;
use crate::units::Seconds;

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shares = &self.shares;
        let step = shares.step;
        let of_step = |part: Seconds| format!("{:.0} %", 100.0 * (part / step));
        writeln!(
            f,
            "{} on {} shards, {} microbatches of {} rows: a step of {step} is predicted. No plan on these devices takes less than {} ({:.2}×).",
            self.model,
            self.devices.len(),
            self.n_microbatches,
            self.microbatch,
            self.bound.step(),
            step / self.bound.step(),
        )?;
        if !self.split.is_empty() {
            let splits: Vec<String> = self.split.iter().map(ToString::to_string).collect();
            writeln!(f, "Split: {}.", splits.join(", "))?;
        }
        writeln!(f, "\nWhere the time of each device goes")?;
        writeln!(
            f,
            "{:<6} {:<16} {:>9} {:>9} {:>9} {:>9}  memory",
            "shard", "device", "computing", "updating", "receiving", "waiting"
        )?;
        for ((i, share), (devices, room)) in shares.shards.iter().enumerate().zip(self.devices.iter().zip(&self.memory))
        {
            writeln!(
                f,
                "{i:<6} {devices:<16} {:>9} {:>9} {:>9} {:>9}  {} of {}",
                of_step(share.computing),
                of_step(share.updating),
                of_step(share.receiving),
                of_step(share.waiting),
                room.needs,
                room.has,
            )?;
        }
        writeln!(f, "\nWhat the memory is for")?;
        for (i, room) in self.memory.iter().enumerate() {
            let Memory { state, gradients, copies, residuals, temporaries, first_run, holes, free } = room.parts;
            let parts = [
                (state, "params and slots"),
                (gradients, "gradients"),
                (copies, "others' params"),
                (residuals, "values between segments"),
                (temporaries, "values inside segments"),
                (first_run, "the plug-in"),
                (holes, "between values"),
                (free, "free"),
            ];
            let parts = parts.into_iter().filter(|(bytes, _)| bytes.0 > 0);
            let parts: Vec<String> = parts.map(|(bytes, name)| format!("{bytes} {name}")).collect();
            writeln!(f, "  shard {i}: {}", parts.join(", "))?;
        }
        if self.recompute.iter().any(Option::is_some) {
            writeln!(f, "\nWhat is computed again, instead of being kept")?;
            for (i, spared) in self.recompute.iter().enumerate() {
                let Some(Spared { time, needs_otherwise }) = spared else { continue };
                let of_step = of_step(*time);
                writeln!(
                    f,
                    "  shard {i}: forward values, for the backward half: {time} of a step ({of_step}); keeping them it would need {needs_otherwise} at least"
                )?;
            }
        }
        if self.again.0 < (1.0 - LEAST_GAIN) * step.0 {
            let less = change(self.again, step);
            writeln!(
                f,
                "\nPlanned again for these devices, a step takes {} ({less}). What follows is compared with that.",
                self.again
            )?;
        }
        writeln!(f, "\nWhat limits the step")?;
        self.limit(f, &of_step)?;
        writeln!(f, "\nWhich constraint binds\n  {}", self.binding())?;
        writeln!(f, "\nThe next best plan\n  {}", self.second())?;
        writeln!(f, "\nWhat more would bring (each planned anew, predicted)")?;
        self.more.iter().try_for_each(|more| {
            let (what, step) = self.gain(more);
            writeln!(f, "  {what:<36} {step}")
        })
    }
}

impl Explanation {
    /// A sentence or two for each question.
    pub fn in_short(&self) -> Short {
        let step = self.shares.step;
        let of_step = |part: Seconds| format!("{:.0} %", 100.0 * (part / step));
        let more = self.more.iter().map(|more| {
            let (what, step) = self.gain(more);
            format!("{what}: {step}")
        });
        Short {
            limit: self.chain(&of_step).join(" "),
            binds: self.binding(),
            next: self.second(),
            more: more.collect(),
        }
    }

    fn limit(&self, f: &mut fmt::Formatter<'_>, of_step: &dyn Fn(Seconds) -> String) -> fmt::Result {
        let mean = self.shares.mean();
        for line in self.chain(of_step) {
            writeln!(f, "  {line}")?;
        }
        writeln!(
            f,
            "  Over all devices: {} computing, {} updating, {} receiving, {} waiting for others.",
            of_step(mean.computing),
            of_step(mean.updating),
            of_step(mean.receiving),
            of_step(mean.waiting)
        )?;
        let op = self.bound_op.as_ref().filter(|_| self.bound.path.0 > self.bound.work.0);
        match op {
            Some(op) => writeln!(f, "  The bound is one op, {op}: it runs for all microbatches on one device."),
            None => writeln!(f, "  The bound is all work, spread over all devices without a gap."),
        }
    }

    /// What the longest chain of work is made of, a sentence for each.
    fn chain(&self, of_step: &dyn Fn(Seconds) -> String) -> Vec<String> {
        let shares = &self.shares;
        let slowest = shares.slowest();
        let others: Seconds = shares.chain.iter().enumerate().filter(|(s, _)| *s != slowest).map(|(_, t)| *t).sum();
        let (mine, device) = (of_step(shares.chain[slowest]), &self.devices[slowest]);
        let first = format!("shard {slowest} on {device}: {mine} of the longest chain of work is its computing.");
        let parts = [
            (others, "other shards computing before, between and after"),
            (shares.transfers, "tensors on their way"),
            (shares.update, "the update"),
            (shares.averaging, "replicas exchanging gradients"),
        ];
        let parts = parts.into_iter().filter(|(part, _)| part.0 > 0.0);
        [first].into_iter().chain(parts.map(|(part, name)| format!("{} of it is {name}.", of_step(part)))).collect()
    }

    fn binding(&self) -> String {
        let Some(binds) = self.binds else {
            return format!(
                "neither memory nor links: without them no plan is {:.0} % faster. What is left is the devices' speed, and that a pipeline fills and drains.",
                100.0 * LEAST_GAIN
            );
        };
        let name = match binds.constraint {
            Constraint::Memory => "memory: without a limit on it",
            Constraint::Links => "the links: if tensors travelled in no time",
        };
        format!("{name}, the step would be {} ({}).", binds.step_without, change(binds.step_without, self.again))
    }

    fn second(&self) -> String {
        let none = || "none: every other choice is refused or comes to the same.".to_owned();
        self.next.as_ref().map_or_else(none, |next| self.loss(next))
    }

    fn loss(&self, next: &Alternative) -> String {
        let what = match next.choice {
            Choice::OtherCuts => "other cuts or devices".to_owned(),
            Choice::Microbatch(rows) => format!("microbatches of {rows} rows"),
            Choice::Schedule(schedule) => format!("the {schedule} schedule"),
            Choice::Shards(n) => format!("{n} shards"),
            Choice::KeepAll => "keeping all values instead of computing some again".to_owned(),
        };
        let step = self.shares.step;
        let verdict = change(next.step, step);
        if next.step.0 < step.0 {
            return format!("{what}: {} ({verdict} than this plan takes).", next.step);
        }
        let Share { computing, updating, receiving, waiting } = next.more;
        let parts = [(computing, "computing"), (updating, "updating"), (receiving, "receiving"), (waiting, "waiting")];
        let more = parts.into_iter().filter(|(time, _)| time.0 > LEAST_GAIN * step.0);
        let more: Vec<String> = more.map(|(time, name)| format!("{time} more {name}")).collect();
        let why = match more.is_empty() {
            true => "about as good".to_owned(),
            false => format!("a mean device spends {}", more.join(" and ")),
        };
        format!("{what}: {} ({verdict}): {why}.", next.step)
    }

    /// More of what, and the step with it.
    fn gain(&self, more: &More) -> (String, String) {
        let what = match &more.of {
            Resource::Device { like } => format!("one more device like {like}"),
            Resource::Bandwidth => "twice the bandwidth of every link".to_owned(),
            Resource::Memory { more } => format!("{more} more on every device"),
        };
        match &more.found {
            Ok(step) => (what, format!("{step} ({})", change(*step, self.again))),
            Err(e) => (what, format!("no plan: {e}")),
        }
    }
}

/// `12 % faster`.
fn change(step: Seconds, than: Seconds) -> String {
    let gain = 1.0 - step / than;
    match gain {
        g if g.abs() < LEAST_GAIN / 2.0 => "the same".to_owned(),
        g if g > 0.0 => format!("{:.0} % less", 100.0 * g),
        g => format!("{:.0} % more", -100.0 * g),
    }
}
