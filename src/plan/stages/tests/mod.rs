mod replicated;
mod sharded;
