//! A zone that is changed step by step, against one that is built at once.

use std::sync::Arc;

use hickory_proto::rr::{Name, RData, RecordType};
use proptest::prelude::*;
use weir_dns::zone::{
    Answer, Domain, EndpointSet, PortProtocol, ServiceKind, ServiceName, Zone, ZoneEndpoint,
    ZoneService,
};

use super::{example, port, service};

#[derive(Clone, Debug)]
enum Step {
    Upsert(Arc<ZoneService>),
    Remove(ServiceName),
    Announce(Arc<str>),
    Retire(Arc<str>),
}

fn apply(zone: &mut Zone, step: &Step) {
    match step {
        Step::Upsert(service) => zone.upsert(service.clone()),
        Step::Remove(name) => zone.remove(name),
        Step::Announce(namespace) => zone.announce(namespace),
        Step::Retire(namespace) => zone.retire(namespace),
    }
}

fn kinds() -> impl Strategy<Value = ServiceKind> {
    let address = (0u8..6).prop_map(|last| std::net::IpAddr::from([10, 0, 0, last]));
    let endpoint =
        (address.clone(), prop::option::of("[ab]")).prop_map(|(address, hostname)| ZoneEndpoint {
            address,
            hostname: hostname.map(Into::into),
        });
    prop_oneof![
        prop::collection::vec(address, 0..3).prop_map(|addresses| ServiceKind::ClusterIp {
            addresses,
            ports: vec![port("p", PortProtocol::Tcp, 1)],
        }),
        prop::collection::vec(endpoint, 0..5).prop_map(|endpoints| ServiceKind::Headless {
            sets: vec![EndpointSet {
                ports: vec![port("p", PortProtocol::Tcp, 1)],
                endpoints,
            }],
        }),
        "[a-c]\\.x".prop_map(|target| ServiceKind::ExternalName {
            target: target.into()
        }),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => ("[mn]", "[a-d]", kinds()).prop_map(|(namespace, name, kind)| {
            Step::Upsert(service(&namespace, &name, kind))
        }),
        2 => ("[mn]", "[a-d]").prop_map(|(namespace, name)| {
            Step::Remove(ServiceName::new(namespace, name))
        }),
        1 => "[mn]".prop_map(|namespace| Step::Announce(namespace.into())),
        1 => "[mn]".prop_map(|namespace| Step::Retire(namespace.into())),
    ];
    prop::collection::vec(step, 0..40)
}

fn empty() -> Zone {
    Zone::new(Domain::new("cluster.local").unwrap(), 5, 0)
}

proptest! {
    #[test]
    fn a_zone_built_step_by_step_equals_one_built_at_once(steps in steps()) {
        let mut grown = empty();
        let mut services = std::collections::BTreeMap::new();
        let mut namespaces = std::collections::BTreeSet::new();
        for step in &steps {
            apply(&mut grown, step);
            match step {
                Step::Upsert(service) => { services.insert((*service.name).clone(), service.clone()); }
                Step::Remove(name) => { services.remove(name); }
                Step::Announce(namespace) => { namespaces.insert(namespace.clone()); }
                Step::Retire(namespace) => { namespaces.remove(namespace); }
            }
        }
        let mut built = empty();
        for service in services.into_values().rev() {
            built.upsert(service);
        }
        for namespace in &namespaces {
            built.announce(namespace);
        }
        prop_assert!(grown.same_names(&built), "{grown:#?}\n{built:#?}");
    }

    #[test]
    fn an_endpoint_is_found_under_the_name_that_its_reverse_gives(
        bits in any::<u128>(), v4 in any::<bool>()
    ) {
        let address: std::net::IpAddr = match v4 {
            true => std::net::Ipv4Addr::from(bits as u32).into(),
            false => std::net::Ipv6Addr::from(bits).into(),
        };
        let mut zone = empty();
        zone.upsert(service("n", "s", ServiceKind::Headless { sets: vec![EndpointSet {
            ports: vec![],
            endpoints: vec![ZoneEndpoint { address, hostname: None }],
        }] }));
        let reverse = Name::from(address);
        let Answer::Records { records, .. } = zone.answer(&reverse, RecordType::PTR) else {
            panic!("{reverse} has no name");
        };
        let RData::PTR(target) = &records[0].data else { panic!("not a PTR") };
        let kind = if v4 { RecordType::A } else { RecordType::AAAA };
        let Answer::Records { records, .. } = zone.answer(target, kind) else {
            panic!("{target} has no address");
        };
        prop_assert_eq!(records[0].data.ip_addr(), Some(address));
    }

    #[test]
    fn no_name_panics(labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 0..7)) {
        let zone = example();
        let domain = ["svc", "cluster", "local"].map(|l| l.as_bytes().to_vec());
        if let Ok(name) = Name::from_labels(labels.into_iter().chain(domain)) {
            let answer = zone.answer(&name, RecordType::A);
            prop_assert!(!matches!(answer, Answer::NotMine));
        }
    }
}
