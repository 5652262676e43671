//! Charts of a run.

use plotters::prelude::*;

/// The loss over steps: every step thin, a moving average thick.
pub fn loss(name: &str, losses: &[f32]) -> anyhow::Result<String> {
    let mut svg = String::new();
    let finite: Vec<(f64, f64)> = losses
        .iter()
        .enumerate()
        .filter(|(_, l)| l.is_finite())
        .map(|(i, &l)| (i as f64 + 1.0, f64::from(l)))
        .collect();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 480)).into_drawing_area();
        let failed = |e: &dyn std::fmt::Display| anyhow::anyhow!("cannot draw the loss: {e}");
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let low = finite.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
        let high = finite.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
        let pad = 0.06 * (high - low);
        let last = finite.last().map_or(1.0, |p| p.0).max(2.0);
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("{name}: loss"), ("sans-serif", 20))
            .margin(18)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(1.0..last, low - pad..high + pad)
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss")
            .x_labels(10)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.2}"))
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(226, 226, 226))
            .label_style(("sans-serif", 14))
            .draw()
            .map_err(|e| failed(&e))?;
        let thin = RGBColor(0x56, 0xB4, 0xE9).stroke_width(1);
        let thick = RGBColor(0x00, 0x72, 0xB2).stroke_width(3);
        chart.draw_series(LineSeries::new(finite.iter().copied(), thin)).map_err(|e| failed(&e))?;
        let weight = 2.0 / (finite.len() as f64 / 20.0 + 1.0).max(2.0);
        let mut mean = None;
        let smooth = finite.iter().map(|&(x, y)| {
            let m = mean.map_or(y, |m: f64| m + weight * (y - m));
            mean = Some(m);
            (x, m)
        });
        chart.draw_series(LineSeries::new(smooth.collect::<Vec<_>>(), thick)).map_err(|e| failed(&e))?;
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}
