//! The drains of one guest, one a device, as if they were one: of rings ([`Drain`]) or of streams
//! (`StreamDrain` of [`super::stream`]).
//!
//! In:    areas, ends and questions for the lanes of a guest
//! Out:   each lane's part to the drain of its device; one answer put together from theirs
//! Runs:  on the client's thread; the answer to a finish comes on the thread of the drain that is the last to be done
//! Full:  as one [`Drain`]; they wait for the file side by side, not one after the other
//! Trust: nothing: lanes that no device can have are refused, and ends of such are not waited for

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vtrace_common::{
    ids::Cpu,
    wire::client::{Area, LaneLedger, LaneSent},
};

use crate::drain::{Done, Drain, Portless};

/// One drain for each device.
#[derive(Debug)]
pub(super) struct Drains {
    drains: Vec<Arc<dyn Drain>>,
    /// Lanes of each device.
    lanes: usize,
}

/// Answers of several drains on their way to be one.
struct Gathered {
    /// By device.
    parts: Vec<Vec<LaneLedger>>,
    missing: usize,
    done: Option<Done>,
}

impl Drains {
    /// Device d, counted from 0, carries the CPUs from d × `lanes` on; `lanes` is not 0.
    pub(super) fn new(drains: Vec<Arc<dyn Drain>>, lanes: usize) -> Self {
        Self { drains, lanes }
    }

    /// The device that carries a CPU, if there is one.
    pub(super) fn device(&self, cpu: Cpu) -> Option<usize> {
        let device = usize::try_from(cpu.0).ok()? / self.lanes;
        (device < self.drains.len()).then_some(device)
    }

    /// Why a CPU's lane has no port although its device is there.
    pub(super) fn portless(&self, cpu: Cpu) -> Option<Portless> {
        self.drains[self.device(cpu)?].portless(cpu)
    }

    /// What belongs to each device, in the order it came; what belongs to none is left out.
    fn parts<T>(&self, all: Vec<T>, cpu: impl Fn(&T) -> Cpu) -> Vec<Vec<T>> {
        let mut parts: Vec<Vec<T>> = self.drains.iter().map(|_| Vec::new()).collect();
        for one in all {
            if let Some(device) = self.device(cpu(&one)) {
                parts[device].push(one);
            }
        }
        parts
    }

    /// Pages go to these areas from now on, past the page cache where there is a `direct`. All lanes, or after an error
    /// none.
    ///
    /// # Errors
    /// Those of [`Drain::attach`]; `InvalidInput` for a lane of no device.
    pub(super) fn attach(
        &self,
        file: &File,
        direct: Option<&File>,
        page_bytes: u32,
        areas: Vec<Area>,
    ) -> io::Result<()> {
        if areas.is_empty() || areas.iter().any(|area| self.device(area.cpu).is_none()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no areas, or one of a CPU that no device has"));
        }
        let parts = self.parts(areas, |area| area.cpu);
        let used = || self.drains.iter().zip(&parts).filter(|(_, areas)| !areas.is_empty());
        for (at, (drain, areas)) in used().enumerate() {
            if let Err(error) = drain.attach(file, direct, page_bytes, areas) {
                used().take(at).for_each(|(drain, _)| drain.detach());
                return Err(error);
            }
        }
        Ok(())
    }

    /// What has come so far, by device and within one in the order of its areas.
    pub(super) fn ledger(&self) -> Vec<LaneLedger> {
        self.drains.iter().flat_map(|drain| drain.ledger()).collect()
    }

    /// [`Drain::finish`] of all at once; `done` is called when the last one is.
    pub(super) fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Done) {
        let parts = self.drains.iter().map(|_| Vec::new()).collect();
        let gathered = Gathered { parts, missing: self.drains.len(), done: Some(done) };
        let gathered = Arc::new(Mutex::new(gathered));
        let sent = self.parts(sent, |lane| lane.cpu);
        for (device, (drain, sent)) in self.drains.iter().zip(sent).enumerate() {
            let gathered = Arc::clone(&gathered);
            drain.finish(sent, wait_ms_max, Box::new(move |lanes| Gathered::add(&gathered, device, lanes)));
        }
    }

    /// Forgets the lanes at once, after writing what they hold.
    pub(super) fn detach(&self) {
        self.drains.iter().for_each(|drain| drain.detach());
    }
}

impl Gathered {
    fn add(gathered: &Mutex<Self>, device: usize, lanes: Vec<LaneLedger>) {
        let mut gathered = gathered.lock().unwrap_or_else(PoisonError::into_inner);
        gathered.parts[device] = lanes;
        gathered.missing -= 1;
        let whole = if gathered.missing == 0 { gathered.done.take() } else { None };
        let parts = whole.is_some().then(|| std::mem::take(&mut gathered.parts));
        drop(gathered);
        if let (Some(done), Some(parts)) = (whole, parts) {
            done(parts.concat());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use crate::drain::ring::RingDrain;
    use vtrace_common::ids::GuestId;

    use super::*;

    fn drains(count: usize, lanes: usize) -> Drains {
        let drain = |_| Arc::new(RingDrain::spawn(GuestId(0), "test").unwrap()) as Arc<dyn Drain>;
        let drains = (0..count).map(drain).collect();
        Drains::new(drains, lanes)
    }

    fn area(cpu: u32) -> Area {
        Area { cpu: Cpu(cpu), offset: u64::from(cpu) * 4096, bytes_max: 4096, begins_again: false }
    }

    fn cpus(ledgers: &[LaneLedger]) -> Vec<u32> {
        ledgers.iter().map(|ledger| ledger.cpu.0).collect()
    }

    fn attach(drains: &Drains, cpus: &[u32]) -> io::Result<()> {
        let areas = cpus.iter().map(|cpu| area(*cpu)).collect();
        drains.attach(&tempfile::tempfile().unwrap(), None, 4096, areas)
    }

    #[test]
    fn cpu_belongs_to_the_device_that_its_number_says() {
        let drains = drains(2, 126);
        let devices = [0, 125, 126, 251, 252, u32::MAX].map(|cpu| drains.device(Cpu(cpu)));
        assert_eq!(devices, [Some(0), Some(0), Some(1), Some(1), None, None]);
    }

    #[test]
    fn finish_of_all_devices_has_one_answer_with_every_lane() {
        let drains = drains(3, 2);
        attach(&drains, &[0, 3, 2]).unwrap();
        assert_eq!(cpus(&drains.ledger()), [0, 3, 2]);
        let (told, hears) = mpsc::channel();
        let sent = vec![LaneSent { cpu: Cpu(3), bytes_out: 8192 }, LaneSent { cpu: Cpu(77), bytes_out: 1 }];
        drains.finish(sent, 0, Box::new(move |lanes| told.send(lanes).unwrap()));
        let ledgers = hears.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(cpus(&ledgers), [0, 3, 2]);
        let missing: Vec<Option<u64>> = ledgers.iter().map(|ledger| ledger.bytes_missing).collect();
        assert_eq!(missing, [None, Some(8192), None], "each end is its own lane's");
        assert!(hears.recv_timeout(Duration::from_millis(50)).is_err(), "one answer");
    }

    #[test]
    fn lanes_are_attached_to_all_devices_or_to_none() {
        let drains = drains(2, 1);
        attach(&drains, &[1]).unwrap();
        assert_eq!(attach(&drains, &[0, 1]).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(cpus(&drains.ledger()), [1], "the one there was stays, the other is taken back");
        drains.detach();
        attach(&drains, &[0, 1]).unwrap();
        assert_eq!(attach(&drains, &[2]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
