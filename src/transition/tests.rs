//! The loop in a toy world: workers whose speed changes, noise as real jobs have it, a planner that splits work in
//! proportion to speed. And single decisions, and recordings.

mod again;
mod rules;
mod scenes;
mod world;
