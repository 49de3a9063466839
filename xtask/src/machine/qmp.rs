//! QMP: QEMU's own control channel (docs/interop/qmp-spec).
//!
//! In: commands. Out: what they return, and events. Runs: in the caller's thread. Full: events are kept until asked for.
//! Trust: QEMU is ours.

use super::Channel;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Qmp {
    channel: Channel,
    events: Vec<Value>,
}

impl Qmp {
    /// Greets and leaves the negotiation mode.
    pub(super) fn new(mut channel: Channel, wait_max: Duration) -> Result<Self> {
        channel.line(Instant::now() + wait_max).context("QMP does not greet")?;
        let mut qmp = Self { channel, events: Vec::new() };
        qmp.execute("qmp_capabilities", &Value::Null, wait_max)?;
        Ok(qmp)
    }

    pub(super) fn execute(&mut self, command: &str, arguments: &Value, wait_max: Duration) -> Result<Value> {
        let end = Instant::now() + wait_max;
        let request = match arguments {
            Value::Null => json!({ "execute": command }),
            _ => json!({ "execute": command, "arguments": arguments }),
        };
        self.channel.send(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.message(end)?;
            if let Some(returned) = message.get_mut("return") {
                return Ok(returned.take());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses: {}", error.get("desc").and_then(Value::as_str).unwrap_or("without a reason"));
            }
            self.events.push(message);
        }
    }

    pub(super) fn event(&mut self, name: &str, wait_max: Duration) -> Result<Value> {
        let end = Instant::now() + wait_max;
        let is_it = |event: &Value| event.get("event").and_then(Value::as_str) == Some(name);
        loop {
            if let Some(at) = self.events.iter().position(is_it) {
                return Ok(self.events.remove(at).get_mut("data").map(Value::take).unwrap_or_default());
            }
            let message = self.message(end)?;
            self.events.push(message);
        }
    }

    fn message(&mut self, end: Instant) -> Result<Value> {
        serde_json::from_slice(&self.channel.line(end)?).context("QMP is not JSON")
    }
}
