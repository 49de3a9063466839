//! `vtrace server`

use super::{args::ServerArgs, complaint::Complaint, put};
use crate::server::{self, GuestConfig, GuestSocket, ServerConfig};

/// Serves guests and clients until it is told to end.
pub(super) fn run(args: &ServerArgs) -> Result<u8, Complaint> {
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
    let guests = args.dom.iter().map(|name| GuestConfig { name: name.clone(), socket: socket.clone() }).collect();
    server::run(&ServerConfig { directory: args.dir.clone(), guests })?;
    Ok(0)
}
