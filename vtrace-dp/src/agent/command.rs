//! The commands that a host runs in this guest while it records.
//!
//! In:    [`CommandRequest`]s that [`super::policy`] has allowed
//! Out:   their output in pieces; their exit status
//! Runs:  on the control thread; their descriptors are in its epoll set
//! Full:  beyond `limits::OUTPUT_TOTAL_BYTES_MAX` a command's output is read, counted and discarded
//! Trust: nothing: a command may write anything, run for ever, and start processes that outlive it. All of them are
//!        killed when the session ends ([`super::process_tree`])

use std::{
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Stdio},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use vtrace_common::{
    limits::{OUTPUT_BYTES_MAX, OUTPUT_TOTAL_BYTES_MAX},
    wire::agent::{CommandRequest, Failure, FailureKind, FromAgent, Output},
};

use super::process_tree::ControlGroup;
use crate::sys::{account::Account, oom, program, signal::unblock_in};

/// A command that was started.
#[derive(Debug)]
pub(super) struct RunningCommand {
    index: u32,
    child: Child,
    end: OwnedFd,
    sent_bytes: u64,
    dropped_bytes: u64,
    ended: bool,
    /// The control group of all its processes, where the kernel has them.
    group: Option<ControlGroup>,
}

/// A command's oom_score_adj; it does not inherit the agent's.
const SCORE: i16 = 0;

/// All streams; a stream's index is part of its epoll tag.
pub(super) const STREAMS: [Stream; 3] = [Stream::Out, Stream::Error, Stream::End];

/// What can be waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Error,
    /// The process itself: readable when it has ended.
    End,
}

impl RunningCommand {
    /// Starts a command in a process group of its own. With a `buffer` the command is added to the processes traced there.
    pub(super) fn start(
        index: u32,
        request: &CommandRequest,
        user: Option<Account>,
        buffer: Option<&Path>,
    ) -> Result<Self, Failure> {
        let mut command = program::command_as(&request.words, buffer, user);
        unblock_in(&mut command);
        oom::set_score_in(&mut command, SCORE);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let group = ControlGroup::make(&mut command);
        let refused = |error: io::Error| Failure {
            kind: if error.kind() == ErrorKind::NotFound { FailureKind::NoSuchProgram } else { FailureKind::Kernel },
            object: request.words.first().cloned().unwrap_or_default(),
            detail: error.to_string(),
            near: Vec::new(),
        };
        let child = command.spawn().map_err(refused)?;
        let end = program::watch(&child).map_err(refused)?;
        let running = Self { index, child, end, sent_bytes: 0, dropped_bytes: 0, ended: false, group };
        for stream in [Stream::Out, Stream::Error] {
            let fd = running.fd(stream).expect("both were piped");
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| refused(errno.into()))?;
        }
        Ok(running)
    }

    /// A descriptor that is readable when the stream has something; `None` after its end.
    pub(super) fn fd(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        match stream {
            Stream::Out => self.child.stdout.as_ref().map(AsFd::as_fd),
            Stream::Error => self.child.stderr.as_ref().map(AsFd::as_fd),
            Stream::End => (!self.ended).then(|| self.end.as_fd()),
        }
    }

    /// The next piece of an output; `None` if nothing waits there now. Closes the output at its end.
    pub(super) fn read(&mut self, stream: Stream) -> Option<FromAgent> {
        let mut bytes = vec![0; OUTPUT_BYTES_MAX];
        loop {
            let read = match stream {
                Stream::Out => self.child.stdout.as_mut().map(|output| output.read(&mut bytes)),
                Stream::Error => self.child.stderr.as_mut().map(|output| output.read(&mut bytes)),
                Stream::End => None,
            };
            match read? {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Ok(0) | Err(_) => {
                    match stream {
                        Stream::Out => drop(self.child.stdout.take()),
                        Stream::Error => drop(self.child.stderr.take()),
                        Stream::End => {}
                    }
                    return None;
                }
                Ok(count) => {
                    let count_sent = u64::try_from(count).expect("usize has at most 64 bits");
                    if self.sent_bytes + count_sent > OUTPUT_TOTAL_BYTES_MAX {
                        self.dropped_bytes += count_sent;
                        continue;
                    }
                    self.sent_bytes += count_sent;
                    bytes.truncate(count);
                    let is_error = stream != Stream::Out;
                    return Some(FromAgent::Output(Output { command: self.index, is_error, bytes }));
                }
            }
        }
    }

    /// Once, after the command has ended: the rest of its output and its exit status.
    pub(super) fn end(&mut self) -> Vec<FromAgent> {
        let Some(status) = self.ended() else { return Vec::new() };
        let mut messages: Vec<_> = std::iter::from_fn(|| self.read(Stream::Out)).collect();
        messages.extend(std::iter::from_fn(|| self.read(Stream::Error)));
        let (command, output_dropped_bytes) = (self.index, self.dropped_bytes);
        messages.push(FromAgent::Exited { command, status, output_dropped_bytes });
        messages
    }

    fn ended(&mut self) -> Option<u8> {
        if self.ended {
            return None;
        }
        let status = self.exit_status()?;
        self.ended = true;
        Some(status)
    }

    /// The exit status if it has ended. It stays a zombie, so that its process id is not used again.
    fn exit_status(&self) -> Option<u8> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).ok()?);
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(pid), flags) {
            Ok(WaitStatus::Exited(_, code)) => u8::try_from(code & 0xff).ok(),
            Ok(WaitStatus::Signaled(_, signal, _)) => u8::try_from(128 + signal as i32).ok(),
            _ => None,
        }
    }

    /// Asks it to end.
    pub(super) fn stop(&self) {
        self.signal(Signal::SIGTERM);
    }

    fn signal(&self, signal: Signal) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            // Fails if all processes of the group have ended.
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        drop(self.group.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn start(line: &[&str]) -> RunningCommand {
        let words = line.iter().map(|word| (*word).into()).collect();
        RunningCommand::start(3, &CommandRequest { words }, None, None).unwrap()
    }

    fn all(running: &mut RunningCommand) -> (Vec<FromAgent>, FromAgent) {
        let (mut told, begun) = (Vec::new(), Instant::now());
        loop {
            for stream in [Stream::Out, Stream::Error] {
                told.extend(std::iter::from_fn(|| running.read(stream)));
            }
            let mut end = running.end();
            if let Some(last) = end.pop() {
                told.extend(end);
                return (told, last);
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "it ends");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn outputs_and_exit_code_are_told_apart() {
        let (told, end) = all(&mut start(&["sh", "-c", "echo good; echo bad >&2; exit 7"]));
        let output = |is_error, text: &str| FromAgent::Output(Output { command: 3, is_error, bytes: text.into() });
        assert!(told.contains(&output(false, "good\n")) && told.contains(&output(true, "bad\n")), "{told:?}");
        assert_eq!(end, FromAgent::Exited { command: 3, status: 7, output_dropped_bytes: 0 });
    }

    #[test]
    fn flood_is_cut_and_counted() {
        let (told, end) = all(&mut start(&["sh", "-c", "head -c 3000000 /dev/zero"]));
        let bytes: usize =
            told.iter().map(|told| if let FromAgent::Output(output) = told { output.bytes.len() } else { 0 }).sum();
        let sent_bytes = u64::try_from(bytes).unwrap();
        assert!(sent_bytes <= OUTPUT_TOTAL_BYTES_MAX);
        let FromAgent::Exited { output_dropped_bytes, .. } = end else { panic!("{end:?}") };
        assert_eq!(sent_bytes + output_dropped_bytes, 3_000_000);
    }

    #[test]
    fn children_of_a_command_end_with_it() {
        first_child_ends_with_the_command("sleep 1000 & echo $!; wait");
    }

    #[test]
    fn child_in_a_session_of_its_own_ends_with_the_command() {
        if ControlGroup::make(&mut std::process::Command::new("true")).is_none() {
            return println!("skipped: no cgroup.kill here");
        }
        first_child_ends_with_the_command("setsid sleep 1000 & echo $!; wait");
        first_child_ends_with_the_command("setsid sh -c 'sleep 1000 & echo $!; wait' & sleep 0.1");
    }

    fn first_child_ends_with_the_command(script: &str) {
        let mut running = start(&["sh", "-c", script]);
        let begun = Instant::now();
        let told = loop {
            if let Some(FromAgent::Output(output)) = running.read(Stream::Out) {
                break String::from_utf8(output.bytes).unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(30));
        };
        drop(running);
        let path = format!("/proc/{}/stat", told.trim());
        let is_over = || std::fs::read_to_string(&path).map_or(true, |stat| stat.contains(") Z "));
        while !is_over() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the child lives on");
        }
    }

    #[test]
    fn program_that_is_not_there_is_said() {
        let words = vec!["no-such-program-here".into()];
        let failure = RunningCommand::start(0, &CommandRequest { words }, None, None).unwrap_err();
        assert_eq!(failure.kind, FailureKind::NoSuchProgram);
    }
}
