//! Faults with 500 jobs each: every job ends once, nothing stays open, nothing is lost.

mod clock;
mod deletes;
mod deliveries;
mod disk;
mod kill;
mod locks;
mod outages;
