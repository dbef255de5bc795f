//! Why a packet was dropped: the one table that programs, counters, events, labels and the page for
//! people (docs/operations.md, "Drops") are made from. A number is given once and never used again.

macro_rules! reasons {
    ($($number:literal $name:ident $label:literal $help:literal)*) => {
        /// Why a packet was dropped.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $help] $name = $number,)*
        }

        impl DropReason {
            /// Every reason, in the order of the numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The reason with this number.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The name in metrics, events and the CLI.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }

            /// One sentence for a person.
            pub const fn help(self) -> &'static str {
                match self {
                    $(Self::$name => $help,)*
                }
            }
        }
    };
}

reasons! {
    1 Malformed "malformed" "A header is cut short or contradicts itself."
    2 NotIp "not_ip" "The frame is neither IPv4 nor IPv6; of ARP the question for a pod's own gateway alone is answered."
    3 VlanTagged "vlan_tagged" "The frame carries a VLAN tag, which no pod may send."
    4 MappedAddress "mapped_address" "An IPv6 packet carries an IPv4-mapped address."
    5 Martian "martian" "The source or destination is loopback, multicast, broadcast or unspecified."
    6 Fragment "fragment" "The packet is a fragment, and the one with its ports has not come before it, or contradicts it."
    7 ExtensionHeader "extension_header" "The packet has IPv6 extension headers or IPv4 options that are not passed on, such as a source route, or too many of them."
    8 NoLease "no_lease" "The device has no lease yet: the pod is being set up or torn down."
    9 SpoofedAddress "spoofed_address" "The source address is not the one leased to the pod."
    10 SpoofedMac "spoofed_mac" "The source Ethernet address is not the one leased to the pod."
    11 EgressDenied "egress_denied" "No policy that isolates the sender allows it to send this."
    12 IngressDenied "ingress_denied" "No policy that isolates the receiver allows it to receive this."
    13 NoVerdict "no_verdict" "The policy tables hold no row for this pair: closed until the agent has written it."
    14 NoBackend "no_backend" "The Service has no endpoint that can serve."
    15 BackendGone "backend_gone" "The backend of this connection has been removed."
    16 NoFlow "no_flow" "A reply or an error about a flow that nobody opened."
    17 TableFull "table_full" "The flow tables could not take another entry."
    18 NatCollision "nat_collision" "Another connection already uses the translated pair of ports."
    19 WriteFailed "write_failed" "The kernel refused to change the packet."
    21 NotForPod "not_for_pod" "The destination is not an address of the pod behind this device."
    22 NoNatPort "no_nat_port" "No NAT port is free: the node's address has no port left towards this peer."
    23 NotTranslatable "not_translatable" "The packet leaves the cluster, but its protocol cannot be translated or the uplink has no address of its family."
    24 PodLimit "pod_limit" "The pod has opened more conversations than one pod may: those of others keep their room."
    26 NoService "no_service" "The destination is a Service's cluster IP, at a port or protocol that the Service does not have."
    27 NoLocalBackend "no_local_backend" "The traffic policy of the Service is Local, and no endpoint of it is on this node."
    28 Tunnel "tunnel" "A pod sends another node the packet of a tunnel (IP in IP, GRE, VXLAN, Geneve), in which could be a packet in anybody's name."
}

/// Rows of the `DROPS` table: one more than the largest number a reason can have.
pub const REASONS: u32 = 256;
