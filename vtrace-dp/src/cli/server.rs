//! `vtrace server`

use clap::ArgMatches;

use super::{args::ServerArgs, complaint::Complaint, output::put};
use crate::{
    server::{
        self, GuestConfig, GuestSocket, ServerConfig, ServerError, activation::descriptors, check_name,
        confine::Confinement, stream::Streams,
    },
    vmm::setup::{Folder, Transport},
};

/// Serves guests and clients until SIGTERM or SIGINT. `matches` are those of the verb `server`: they contain the order.
pub(super) fn run(args: &ServerArgs, matches: &ArgMatches) -> Result<u8, Complaint> {
    if args.print_capabilities {
        // docs/interop/vhost-user.rst, "Backend program conventions"
        put(r#"{"type": "console"}"#)?;
        return Ok(0);
    }
    let socket = match (&args.socket_path, args.fd) {
        (Some(path), _) => GuestSocket::Path(path.clone()),
        (None, Some(fd)) => GuestSocket::Inherited(fd),
        (None, None) => GuestSocket::InDirectory,
    };
    if socket != GuestSocket::InDirectory && args.dom.len() != 1 {
        let why = "--socket-path and --fd are for one guest";
        return Err(Complaint::usage("the server cannot run", why, "vtrace server --dom guest1 --socket-path PATH"));
    }
    let guests = guests(args, matches, &socket)?;
    let listen_pid = std::env::var("LISTEN_PID").ok();
    let listen_fds = std::env::var("LISTEN_FDS").ok();
    let passed =
        descriptors(std::process::id(), listen_pid.as_deref(), listen_fds.as_deref()).map_err(ServerError::from)?;
    server::run(&ServerConfig { directory: args.dir.clone(), guests, passed, confinement: confinement(args) })?;
    Ok(0)
}

/// The privileges that the server drops.
fn confinement(args: &ServerArgs) -> Confinement {
    match &args.user {
        Some(name) => Confinement::As(name.clone()),
        None if args.unconfined => Confinement::None,
        None => Confinement::Usual,
    }
}

/// The guests in order, each with its options.
fn guests(args: &ServerArgs, matches: &ArgMatches, socket: &GuestSocket) -> Result<Vec<GuestConfig>, Complaint> {
    let devices = of_each(matches, "devices", "--devices", &args.devices)?;
    let lanes = of_each(matches, "lanes_per_device", "--lanes-per-device", &args.lanes_per_device)?;
    let mut guests = Vec::new();
    for (name, (devices, lanes)) in args.dom.iter().zip(devices.into_iter().zip(lanes)) {
        let config = as_set_up(args, name, socket)?;
        if matches!(config.socket, GuestSocket::Streams(_)) && (devices.is_some() || lanes.is_some()) {
            let why = format!("{name} was set up without vhost-user devices (vtrace setup)");
            let remedy = format!("vtrace setup --dom {name} --cpus N --transport vhost-user");
            return Err(Complaint::usage("the server cannot run", why, remedy));
        }
        guests.push(GuestConfig {
            devices: devices.unwrap_or(config.devices),
            lanes: lanes.unwrap_or(config.lanes),
            ..config
        });
    }
    Ok(guests)
}

/// A guest with the setup of `vtrace setup`; the default is a vhost-user device.
fn as_set_up(args: &ServerArgs, name: &str, socket: &GuestSocket) -> Result<GuestConfig, Complaint> {
    let config = GuestConfig::new(name, socket.clone());
    // Names become parts of paths only after this.
    check_name(name).map_err(ServerError::from)?;
    if *socket != GuestSocket::InDirectory {
        return Ok(config);
    }
    let folder = Folder::of(&args.root, name);
    let setup = folder.setup().map_err(|fault| Complaint::setup("the server cannot run", &fault))?;
    Ok(match setup {
        None => config,
        Some(setup) if setup.transport == Transport::VhostUser => GuestConfig { devices: setup.devices(), ..config },
        Some(setup) => GuestConfig { socket: GuestSocket::Streams(Streams { folder, setup }), ..config },
    })
}

/// The value of an option for each guest: it follows the guest's name, at most once.
fn of_each(matches: &ArgMatches, id: &str, option: &str, values: &[usize]) -> Result<Vec<Option<usize>>, Complaint> {
    let doms: Vec<usize> = matches.indices_of("dom").into_iter().flatten().collect();
    let mut of_each = vec![None; doms.len()];
    for (index, value) in matches.indices_of(id).into_iter().flatten().zip(values) {
        let before = doms.iter().filter(|dom| **dom < index).count();
        let slot = before.checked_sub(1).map(|guest| &mut of_each[guest]);
        if slot.is_none_or(|slot| slot.replace(*value).is_some()) {
            let why = format!("{option} applies to the preceding --dom, and may be given once for each");
            return Err(Complaint::usage("the server cannot run", why, format!("--dom GUEST {option} {value}")));
        }
    }
    Ok(of_each)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;
    use crate::cli::args::{Args, Verb};

    fn parse(words: &str) -> Result<Vec<(usize, usize)>, Complaint> {
        let matches = Args::command().try_get_matches_from(words.split(' ')).unwrap();
        let Verb::Server(args) = Args::from_arg_matches(&matches).unwrap().verb else { panic!("not server") };
        let guests = guests(&args, matches.subcommand().unwrap().1, &GuestSocket::InDirectory)?;
        Ok(guests.into_iter().map(|guest| (guest.devices, guest.lanes)).collect())
    }

    #[test]
    fn devices_apply_to_the_guest_before_them() {
        let words = "vtrace server --dom a --dom b --devices 3 --dom c --lanes-per-device 2 --devices 2";
        assert_eq!(parse(words).unwrap(), [(1, 126), (3, 126), (2, 2)]);
    }

    #[test]
    fn devices_of_no_guest_or_given_twice_are_usage_errors() {
        for words in ["vtrace server --devices 2 --dom a", "vtrace server --dom a --devices 2 --devices 2"] {
            assert_eq!(parse(words).unwrap_err().status, crate::cli::exit_status::USAGE, "{words}");
        }
    }

    #[test]
    fn invalid_counts_are_refused_by_the_parser() {
        for words in ["--devices 0", "--devices 9", "--lanes-per-device 0", "--lanes-per-device 127"] {
            let words = format!("vtrace server --dom a {words}");
            assert!(Args::command().try_get_matches_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
