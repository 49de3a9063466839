//! One CPU's ring and, while a client wants its pages, its lane.
//!
//! In:    chains of the ring
//! Out:   bytes to the lane; used entries, held back until their bytes are written
//! Runs:  on the worker's thread
//! Full:  at half a ring of held entries the batch is written and they are given back
//! Trust: the guest with nothing: a fault ends the ring, the lane keeps what it has

use std::sync::Arc;

use vtrace_common::{ids::Cpu, limits::RING_ENTRIES_MAX};

use super::{lane::Lane, ledger::Ledger, sink::Sink};
use crate::device::{
    memory::{Batch, Memory, Span},
    ring::{Chain, Ring, RingFault},
};

/// A CPU as its worker sees it.
#[derive(Debug)]
pub(super) struct Road {
    pub(super) cpu: Cpu,
    /// Kicked, or not done at its last turn.
    pub(super) ready: bool,
    pub(super) lane: Option<Lane>,
    ring: Option<Ring>,
    /// The ring is not served any more. It stays, so that the VMM can ask for its base.
    broken: bool,
    batch: Batch,
    /// Chains whose bytes are in the batch. Never more than a ring has entries.
    chains: Vec<Chain>,
    /// Bytes that came while there was no lane.
    discarded_bytes: u64,
}

impl Road {
    pub(super) fn new(cpu: Cpu) -> Self {
        let chains = Vec::with_capacity(usize::from(RING_ENTRIES_MAX));
        let (batch, discarded_bytes) = (Batch::new(Arc::default()), 0);
        let (ready, broken, lane, ring) = (false, false, None, None);
        Self { cpu, ready, lane, ring, broken, batch, chains, discarded_bytes }
    }

    /// The ring, if it is served.
    pub(super) fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref().filter(|_| !self.broken)
    }

    /// The ring to be served is there, and not at fault.
    pub(super) fn runs(&self) -> bool {
        self.ring().is_some()
    }

    pub(super) fn discarded_bytes(&self) -> u64 {
        self.discarded_bytes
    }

    /// A ring runs from now on. There is none.
    pub(super) fn start(&mut self, ring: Ring) {
        self.batch = Batch::new(Arc::clone(ring.memory()));
        (self.ring, self.broken, self.ready) = (Some(ring), false, true);
    }

    /// Nobody needs it: another CPU may have it.
    pub(super) fn unused(&self) -> bool {
        self.ring.is_none() && self.lane.is_none()
    }

    /// Gives up the ring, whose chains were flushed. Its base.
    pub(super) fn stop(&mut self) -> Option<u16> {
        self.chains.clear();
        (self.broken, self.ready) = (false, false);
        self.ring.take().map(|ring| ring.base())
    }

    /// Stops serving the ring, whatever it holds. What the lane has is written.
    pub(super) fn end(&mut self, sink: &mut dyn Sink) {
        self.chains.clear();
        (self.broken, self.ready) = (true, false);
        if let Some(lane) = &mut self.lane {
            lane.write(&mut self.batch, sink);
        }
        self.batch.clear();
    }

    /// Something of ours went wrong in the middle of it: touches nothing that might be half done.
    pub(super) fn abandon(&mut self) {
        self.chains.clear();
        self.batch.clear();
        (self.broken, self.ready, self.lane) = (true, false, None);
    }

    /// The memory table changed. Chains were flushed.
    pub(super) fn remap(&mut self, memory: Arc<Memory>) -> Result<(), RingFault> {
        let Some(ring) = self.ring.as_mut().filter(|_| !self.broken) else { return Ok(()) };
        ring.remap(Arc::clone(&memory))?;
        self.batch = Batch::new(memory);
        Ok(())
    }

    pub(super) fn set_call(&mut self, call: Option<std::os::fd::OwnedFd>) {
        if let Some(ring) = &mut self.ring {
            ring.set_call(call);
        }
    }

    /// Chains are held: somebody must come back in time.
    pub(super) fn holds(&self) -> bool {
        !self.chains.is_empty()
    }

    /// Takes chains until none is there and the next kick is asked for, at most a ring's worth. `ready` says whether
    /// there may be more. Hot.
    pub(super) fn serve(&mut self, sink: &mut dyn Sink, spans: &mut Vec<Span>) -> Result<(), RingFault> {
        self.ready = false;
        for _ in 0..self.ring().map_or(0, Ring::entries) {
            if self.half_is_held() {
                self.flush(sink)?;
            }
            spans.clear();
            let Some(ring) = &mut self.ring else { return Ok(()) };
            match ring.take(spans)? {
                Some(chain) => self.accept(chain, sink, spans)?,
                None if !self.arm()? => return Ok(()),
                None => {}
            }
        }
        self.ready = self.runs();
        Ok(())
    }

    fn half_is_held(&self) -> bool {
        self.ring().is_some_and(|ring| ring.entries_held() >= half(ring))
    }

    fn accept(&mut self, chain: Chain, sink: &mut dyn Sink, spans: &[Span]) -> Result<(), RingFault> {
        self.chains.push(chain);
        let Some(lane) = &mut self.lane else {
            self.discarded_bytes += u64::from(chain.readable_bytes);
            return Ok(());
        };
        // Readable spans come first and add up; what is writable is none of ours.
        let mut left = chain.readable_bytes;
        for span in spans {
            if left == 0 {
                break;
            }
            left -= span.bytes;
            lane.accept(*span, &mut self.batch, sink)?;
        }
        Ok(())
    }

    /// Asks for the next kick: at the next chain, or, while chains are held and the timer runs, when half the ring is
    /// out. True if that has come already.
    fn arm(&mut self) -> Result<bool, RingFault> {
        if self.lane.is_none() {
            self.give_back()?;
        }
        let held = u32::try_from(self.chains.len()).unwrap_or(u32::MAX);
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let missing = half(ring).saturating_sub(ring.entries_held());
        let chains = if held == 0 { 1 } else { u16::try_from(missing).unwrap_or(1) };
        ring.arm_kick_after(chains)
    }

    /// Writes what is held, then gives the chains back. Hot.
    pub(super) fn flush(&mut self, sink: &mut dyn Sink) -> Result<(), RingFault> {
        if let Some(lane) = &mut self.lane {
            lane.write(&mut self.batch, sink);
        }
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), RingFault> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        for chain in self.chains.drain(..) {
            ring.complete(chain, 0)?;
        }
        ring.publish().map(drop)
    }

    /// Time is up: takes what has come meanwhile, writes, gives back, asks for the next kick. Hot.
    pub(super) fn tick(&mut self, sink: &mut dyn Sink, spans: &mut Vec<Span>) -> Result<(), RingFault> {
        self.serve(sink, spans)?;
        self.flush(sink)?;
        self.ready |= self.runs() && self.arm()?;
        Ok(())
    }

    /// Closes the lane, if there is one. Chains were flushed.
    pub(super) fn close(&mut self, sink: &mut dyn Sink, bytes_sent: Option<u64>) -> Option<Ledger> {
        let lane = self.lane.take()?;
        Some(lane.close(&mut self.batch, sink, bytes_sent))
    }
}

fn half(ring: &Ring) -> u32 {
    u32::from(ring.entries() / 2).max(1)
}
