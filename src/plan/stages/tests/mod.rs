mod ideals;
mod replicated;
mod sharded;
