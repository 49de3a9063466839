//! Clients of different users.

use std::{fs, os::unix::fs::PermissionsExt};

use vtrace_common::{limits::USER_CLIENTS_MAX, wire::client::GuestState};

use super::*;
use crate::sys::account::testing::as_user;

/// A user who is neither root nor in the group: by convention the one without rights.
const OTHER: u32 = 65_534;

/// A house whose control socket another user may open.
fn open_house() -> House {
    let house = House::new();
    fs::set_permissions(house.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(house.path().join(CONTROL_SOCKET), fs::Permissions::from_mode(0o666)).unwrap();
    house
}

fn listed(link: &mut Link) -> GuestState {
    match ask(link, &ToServer::List) {
        FromServer::Guests(guests) => guests.into_iter().find(|guest| guest.name == "guest1").unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn user_outside_the_group_does_not_come_in() {
    let house = House::new();
    fs::set_permissions(house.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let refused = as_user(OTHER, || Link::connect(house.path()).unwrap_err());
    assert!(matches!(refused, LinkError::Denied { .. }), "{refused:?}");
}

#[test]
fn another_users_session_is_neither_touched_nor_shown() {
    let house = open_house();
    let mut machine = house.guest("guest1");
    let mut holder = house.link();
    assert!(is_claimed(&claim(&mut holder)));
    let pid = std::process::id();
    assert_eq!(listed(&mut holder).holder_pid, Some(pid));
    as_user(OTHER, || {
        let mut other = house.link();
        let seen = listed(&mut other);
        assert_eq!((seen.holder_pid, seen.holder_uid), (Some(0), Some(0)), "that it is held, not by which process");
        let held = Refusal::Held { guest: guest1(), holder_pid: 0, holder_uid: 0 };
        assert_eq!(claim(&mut other), FromServer::Refused(held));
        let requests = [
            to_agent(ToAgent::Stop),
            to_agent(ToAgent::Close),
            ToServer::Ledger { guest: guest1() },
            ToServer::Finish { guest: guest1(), sent: vec![], wait_ms_max: 0 },
            ToServer::Release { guest: guest1() },
            ToServer::Lanes(Lanes { guest: guest1(), page_bytes: 4096, areas: vec![] }),
        ];
        for request in &requests {
            let refused = ask(&mut other, request);
            assert!(matches!(refused, FromServer::Refused(Refusal::State { .. })), "{request:?}: {refused:?}");
        }
    });
    // Nothing of it reached the agent, and the guest is still the holder's.
    holder.send(&to_agent(ToAgent::Ping { id: 7 })).unwrap();
    assert_eq!(machine.read::<ToAgent>(), ToAgent::Ping { id: 7 });
    release(&mut holder);
}

#[test]
fn root_is_told_of_every_users_process() {
    let house = open_house();
    let _machine = house.guest("guest1");
    let mut other = as_user(OTHER, || house.link());
    assert!(is_claimed(&claim(&mut other)));
    let pid = std::process::id();
    let mut root = house.link();
    let seen = listed(&mut root);
    assert_eq!((seen.holder_pid, seen.holder_uid), (Some(pid), Some(OTHER)));
    assert_eq!(listed(&mut other).holder_pid, Some(pid), "a user is told of its own");
}

#[test]
fn one_users_clients_leave_room_for_others() {
    let house = open_house();
    let (links, full) = as_user(OTHER, || {
        let links: Vec<Link> = (0..USER_CLIENTS_MAX).map(|_| house.link()).collect();
        (links, next(&mut house.link()))
    });
    assert_eq!(full, FromServer::Refused(Refusal::Full));
    assert!(matches!(ask(&mut house.link(), &ToServer::List), FromServer::Guests(_)));
    drop(links);
}
