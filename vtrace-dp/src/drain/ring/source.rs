//! One CPU's ring and, while a client wants its pages, its lane.
//!
//! In:    chains of the ring
//! Out:   bytes to the lane; used entries, held back until their bytes are written
//! Runs:  on the worker's thread
//! Full:  at half a ring, or at as many bytes as the sink wants, the batch is written; entries are given back, in their
//!        order, when their bytes are in the file
//! Trust: the guest with nothing: a fault ends the ring, the lane keeps what it has

use std::{collections::VecDeque, sync::Arc};

use vtrace_common::{ids::Cpu, limits::RING_ENTRIES_MAX, wire::client::LaneLedger};

use super::lane::RingLane;
use crate::{
    drain::sink::Sink,
    sys::write_all::Written,
    virtq::{
        memory::{Batch, Memory, Span},
        ring::{Chain, Ring, RingFault},
    },
};

/// A CPU as its worker sees it.
#[derive(Debug)]
pub(super) struct RingSource {
    pub(super) cpu: Cpu,
    /// Kicked, or not done at its last turn.
    pub(super) ready: bool,
    /// The worker knows that it is ready.
    pub(super) queued: bool,
    /// The worker knows that it holds chains.
    pub(super) timed: bool,
    /// It held chains at the last tick, too, and has written nothing since.
    stale: bool,
    pub(super) lane: Option<RingLane>,
    ring: Option<Ring>,
    /// The ring is not served any more. It stays, so that the VMM can ask for its base.
    broken: bool,
    batch: Batch,
    /// Chains that were not given back. Never more than a ring has entries.
    chains: VecDeque<Chain>,
    /// Those, from the last one on, whose bytes were not given to the sink yet: chains and entries of the ring.
    held: (usize, u32),
}

impl RingSource {
    pub(super) fn new(cpu: Cpu) -> Self {
        Self {
            cpu,
            ready: false,
            queued: false,
            timed: false,
            stale: false,
            lane: None,
            ring: None,
            broken: false,
            batch: Batch::new(Arc::default()),
            chains: VecDeque::with_capacity(usize::from(RING_ENTRIES_MAX)),
            held: (0, 0),
        }
    }

    /// The ring, if it is served.
    pub(super) fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref().filter(|_| !self.broken)
    }

    /// The ring to be served is there, and not at fault.
    pub(super) fn runs(&self) -> bool {
        self.ring().is_some()
    }

    /// Starts serving a ring. The source has no ring yet.
    pub(super) fn start(&mut self, ring: Ring) {
        self.batch.remap(ring.memory());
        (self.ring, self.broken, self.ready) = (Some(ring), false, true);
    }

    /// Has neither ring nor lane: another CPU may take this source.
    pub(super) fn unused(&self) -> bool {
        self.ring.is_none() && self.lane.is_none()
    }

    /// Gives up the ring, whose chains were flushed and whose writes have landed. Its base.
    pub(super) fn stop(&mut self) -> Option<u16> {
        self.forget_chains();
        (self.broken, self.ready) = (false, false);
        // The batch is empty. It must not keep the memory of a VMM that is gone mapped.
        self.batch.remap(&Arc::default());
        self.ring.take().map(|ring| ring.base())
    }

    /// Stops serving the ring, whatever it holds. What the lane has is written; its next page, if a ring comes that
    /// brings one, says that something is missing.
    pub(super) fn end(&mut self, sink: &mut dyn Sink) {
        (self.broken, self.ready) = (true, false);
        if let Some(lane) = &mut self.lane {
            lane.write(&mut self.batch, sink);
            lane.lost();
        }
        self.batch.clear();
        self.forget_chains();
    }

    /// Something of ours went wrong in the middle of it: touches nothing that might be half done.
    pub(super) fn abandon(&mut self) {
        (self.broken, self.ready, self.lane) = (true, false, None);
        self.batch.clear();
        self.forget_chains();
    }

    fn forget_chains(&mut self) {
        self.chains.clear();
        (self.held, self.stale) = ((0, 0), false);
        if let Some(lane) = &mut self.lane {
            lane.forget_chains();
        }
    }

    /// The memory table changed. Chains were flushed and writes have landed.
    pub(super) fn remap(&mut self, memory: Arc<Memory>) -> Result<(), RingFault> {
        let Some(ring) = self.ring.as_mut().filter(|_| !self.broken) else { return Ok(()) };
        ring.remap(Arc::clone(&memory))?;
        self.batch.remap(&memory);
        Ok(())
    }

    pub(super) fn set_call(&mut self, call: Option<std::os::fd::OwnedFd>) {
        if let Some(ring) = &mut self.ring {
            ring.set_call(call);
        }
    }

    /// Holds chains that are not yet given to the sink: the worker has to come back in time.
    pub(super) fn holds(&self) -> bool {
        self.held.0 > 0
    }

    /// Takes chains until none is there and the next kick is asked for, at most a ring's worth. `ready` says whether
    /// there may be more. Hot.
    pub(super) fn serve(&mut self, sink: &mut dyn Sink, spans: &mut Vec<Span>) -> Result<(), RingFault> {
        self.ready = false;
        for _ in 0..self.ring().map_or(0, Ring::entries) {
            if self.is_due(sink) {
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

    /// The batch has grown enough, or the guest waits for entries.
    fn is_due(&self, sink: &dyn Sink) -> bool {
        self.batch.bytes() >= sink.write_bytes() || self.ring().is_some_and(|ring| self.held.1 >= half(ring))
    }

    fn accept(&mut self, chain: Chain, sink: &mut dyn Sink, spans: &[Span]) -> Result<(), RingFault> {
        let Some(lane) = &mut self.lane else {
            self.hold(chain);
            return Ok(());
        };
        spans.iter().for_each(|span| self.batch.memory().prefetch(*span));
        // Readable spans come first and add up; writable spans are not read.
        let mut left = chain.readable_bytes;
        for span in spans {
            if left == 0 {
                break;
            }
            left -= span.bytes;
            lane.accept(*span, &mut self.batch, sink)?;
        }
        lane.chain_ended();
        self.hold(chain);
        Ok(())
    }

    fn hold(&mut self, chain: Chain) {
        self.chains.push_back(chain);
        self.held = (self.held.0 + 1, self.held.1 + u32::from(chain.entries));
    }

    /// Asks for the next kick: at the next chain, or, while chains are held and the timer runs, when half the ring is
    /// held, or the guest has no more entries. True if that has come already.
    fn arm(&mut self) -> Result<bool, RingFault> {
        if self.lane.is_none() {
            self.give_back()?;
        }
        let held = self.held;
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let missing = half(ring).saturating_sub(held.1);
        let free = u32::from(ring.entries()).saturating_sub(ring.entries_held());
        let chains = if held.0 == 0 { 1 } else { u16::try_from(missing.min(free)).unwrap_or(1) };
        ring.arm_kick_after(chains)
    }

    /// Gives what is held to the sink, and chains whose writes are over to the guest. Hot.
    pub(super) fn flush(&mut self, sink: &mut dyn Sink) -> Result<(), RingFault> {
        if let Some(lane) = &mut self.lane {
            lane.write(&mut self.batch, sink);
            (self.held, self.stale) = ((0, 0), false);
        }
        self.give_back()
    }

    /// A write of this lane has ended. Hot.
    pub(super) fn landed(&mut self, tag: u64, written: Written) -> Result<(), RingFault> {
        let Some(lane) = &mut self.lane else { return Ok(()) };
        lane.landed(tag, written);
        if self.runs() { self.give_back() } else { Ok(()) }
    }

    fn give_back(&mut self) -> Result<(), RingFault> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let done = match &mut self.lane {
            Some(lane) => lane.chains_done(),
            None => {
                self.held = (0, 0);
                self.chains.len()
            }
        };
        for chain in self.chains.drain(..done) {
            ring.complete(chain, 0)?;
        }
        ring.publish().map(drop)
    }

    /// A tick: chains that were held at the last one are written now, with what has come meanwhile; others have time
    /// until the next. Hot.
    pub(super) fn tick(&mut self, sink: &mut dyn Sink, spans: &mut Vec<Span>) -> Result<(), RingFault> {
        if !self.stale {
            self.stale = self.holds();
            return Ok(());
        }
        self.drain(sink, spans)
    }

    /// Takes what has come, writes, gives back, asks for the next kick. Hot.
    pub(super) fn drain(&mut self, sink: &mut dyn Sink, spans: &mut Vec<Span>) -> Result<(), RingFault> {
        self.serve(sink, spans)?;
        self.flush(sink)?;
        self.ready |= self.runs() && self.arm()?;
        Ok(())
    }

    /// Gives the last whole pages of the lane to the sink.
    pub(super) fn end_lane(&mut self, sink: &mut dyn Sink) -> Result<(), RingFault> {
        let Some(lane) = &mut self.lane else { return Ok(()) };
        lane.end(&mut self.batch, sink);
        if self.runs() { self.flush(sink) } else { Ok(()) }
    }

    /// Closes the lane, if there is one. It was ended, and its writes have landed.
    pub(super) fn close(&mut self, sink: &mut dyn Sink, bytes_sent: Option<u64>) -> Option<LaneLedger> {
        let lane = self.lane.take()?;
        Some(lane.close(&mut self.batch, sink, bytes_sent))
    }
}

fn half(ring: &Ring) -> u32 {
    u32::from(ring.entries() / 2).max(1)
}
