//! Where the end of a job may be told: `WEBHOOK_HOSTS`. Submit asks when a `callback_url` comes, webhook
//! again before it sends, and of every address that it is about to connect to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use reqwest::Url;

use crate::config::{ConfigError, Env};
use crate::error::{Code, Error};

/// The longest `callback_url`, in bytes.
pub const MAX_URL_BYTES: usize = 2048;
/// The stage whose receivers may be this machine itself: one's own host, where nothing names a stage, and the
/// emulator's.
const LOCAL_STAGE: &str = "local";

/// IPv4 that is nobody's on the public Internet, or everybody's: network and length of its prefix. From
/// IANA's registry of special-purpose addresses, with multicast and what is reserved.
const NOT_PUBLIC_V4: [(Ipv4Addr, u32); 15] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
/// IPv6 has one block that is public, and these are the parts of it that are not: special purposes (Teredo
/// among them), documentation twice, and 6to4, which may carry any IPv4.
const PUBLIC_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const NOT_PUBLIC_V6: [(Ipv6Addr, u32); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Whether an address is somebody's on the public Internet. An IPv4 address in IPv6's clothes (mapped,
/// compatible, NAT64) lies outside of what is public there, whatever it is.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let within = |(network, length): &(Ipv4Addr, u32)| {
                (address.to_bits() ^ network.to_bits()).leading_zeros() >= *length
            };
            !NOT_PUBLIC_V4.iter().any(within)
        }
        IpAddr::V6(address) => {
            let within = |(network, length): &(Ipv6Addr, u32)| {
                (address.to_bits() ^ network.to_bits()).leading_zeros() >= *length
            };
            within(&PUBLIC_V6) && !NOT_PUBLIC_V6.iter().any(within)
        }
    }
}

/// A receiver that the operator has named.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Receiver {
    /// As [`Url::host_str`] writes it: names in lower case, addresses in their one notation.
    host: String,
    /// The scheme's own where none was named.
    port: Option<u16>,
}

impl Receiver {
    /// `host` or `host:port`.
    fn read(text: &str, local: bool) -> Result<Self, ConfigError> {
        let wrong = |problem: &str| ConfigError::new("WEBHOOK_HOSTS", problem);
        let url = Url::parse(&format!("https://{text}")).ok();
        let url = url.filter(|url| !text.contains(['/', '\\', '?', '#', '@']) && url.has_host());
        let url = url.ok_or_else(|| wrong("takes hosts, each with a port or without, and nothing else of a URL"))?;
        let host = url.host_str().unwrap_or("").to_owned();
        let may_be_told = literal(&host).is_none_or(is_public) || (local && is_this_machine(&host));
        may_be_told.then(|| Self { host, port: url.port() }).ok_or_else(|| wrong("names an address that is not public"))
    }

    fn is(&self, url: &Url) -> bool {
        let usual = if url.scheme() == "http" { 80 } else { 443 };
        url.host_str() == Some(&self.host) && url.port_or_known_default() == Some(self.port.unwrap_or(usual))
    }
}

/// The address that a host is, where it is no name.
fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether a host is this machine by its very name. A name that only resolves to it is not.
fn is_this_machine(host: &str) -> bool {
    host == "localhost" || literal(host).is_some_and(|address| address.is_loopback())
}

/// The receivers that may be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destinations {
    receivers: Vec<Receiver>,
    /// Whether a receiver may be this machine itself, then over plain HTTP as well.
    local: bool,
}

impl Destinations {
    /// `WEBHOOK_HOSTS`, and whether `STAGE` is the local one.
    ///
    /// # Errors
    /// [`ConfigError`] where a host is none, or one that could never be told.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let local = env.text("STAGE")?.is_none_or(|stage| stage == LOCAL_STAGE);
        let hosts = env.text("WEBHOOK_HOSTS")?.unwrap_or("").split(',').map(str::trim).filter(|host| !host.is_empty());
        let receivers = hosts.map(|host| Receiver::read(host, local)).collect::<Result<_, _>>()?;
        Ok(Self { receivers, local })
    }

    /// Whether nobody is ever told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.receivers.is_empty()
    }

    /// A `callback_url`, as it is to be called.
    ///
    /// # Errors
    /// 422 where it may not be called. The message repeats nothing of it.
    pub fn check(&self, callback_url: &str) -> Result<Url, Error> {
        if self.is_empty() {
            return Err(refused("This host calls nobody back; its operator sets WEBHOOK_HOSTS."));
        }
        if callback_url.len() > MAX_URL_BYTES {
            return Err(refused("\"callback_url\" is longer than 2048 bytes."));
        }
        let url = Url::parse(callback_url).map_err(|_| refused("\"callback_url\" is no absolute URL."))?;
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(refused("\"callback_url\" may hold no credentials and no fragment."));
        }
        if !self.receivers.iter().any(|receiver| receiver.is(&url)) {
            return Err(refused("The host of \"callback_url\" is none of those that the operator allows."));
        }
        match url.scheme() {
            "https" => Ok(url),
            "http" if self.local && url.host_str().is_some_and(is_this_machine) => Ok(url),
            _ => Err(refused("\"callback_url\" must begin with https://.")),
        }
    }

    /// Whether an address may be connected to for a receiver of this name.
    #[must_use]
    pub fn permits(&self, host: &str, address: IpAddr) -> bool {
        is_public(address) || (self.local && address.is_loopback() && is_this_machine(host))
    }
}

fn refused(message: &str) -> Error {
    Error::new(Code::CallbackNotAllowed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destinations(hosts: &str, stage: &str) -> Result<Destinations, ConfigError> {
        Destinations::from_env(&Env::of([("WEBHOOK_HOSTS", hosts), ("STAGE", stage)]))
    }

    fn addresses(text: &str) -> impl Iterator<Item = IpAddr> {
        text.split_whitespace().map(|address| address.parse().unwrap())
    }

    #[test]
    fn no_address_is_public_that_is_private_local_special_or_many() {
        let special = "0.0.0.0 0.1.2.3 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.255.255.255
            169.254.0.1 169.254.169.254 172.16.0.0 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1
            192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1
            239.255.255.255 240.0.0.1 255.255.255.255";
        for address in addresses(special) {
            assert!(!is_public(address), "{address}");
            let IpAddr::V4(v4) = address else { panic!() };
            let [a, b, c, d] = v4.octets().map(u16::from);
            let (high, low) = (a << 8 | b, c << 8 | d);
            // Mapped, compatible, NAT64 (both prefixes), 6to4, Teredo's server, ISATAP below a link-local prefix.
            for v6 in [
                Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
                Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
                Ipv6Addr::new(0x2001, 0, high, low, 0, 0, 0, 1),
                Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0x5efe, high, low),
            ] {
                assert!(!is_public(v6.into()), "{v6}");
            }
        }
        let special = ":: ::1 ::2 100::1 fc00::1 fd00:ec2::254 fdff::1 fe80::1 febf::1 fec0::1 ff02::1 ff0e::1
            2001:db8::1 2001:2::1 2001:10::1 2001:20::1 2001:1ff::1 3fff::1 3fff:fff::1 5f00::1 4000::1 1fff::1";
        for address in addresses(special) {
            assert!(!is_public(address), "{address}");
        }
    }

    #[test]
    fn the_neighbours_of_what_is_not_public_are() {
        let public = "1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
            169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.88.98.1
            192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.1 203.0.112.1 203.0.114.1
            223.255.255.255 2000::1 2001:200::1 2001:4860:4860::8888 2001:db7::1 2001:db9::1 2003::1
            2606:4700::1111 3ffe::1 3fff:1000::1";
        for address in addresses(public) {
            assert!(is_public(address), "{address}");
        }
    }

    #[test]
    fn a_callback_goes_to_a_listed_host_over_https_alone() {
        let destinations = destinations("hooks.example, Other.Example:8443, 1.1.1.1", "prod").unwrap();
        for url in [
            "https://hooks.example/a?b=c",
            "https://HOOKS.example:443",
            "https://other.example:8443/",
            "https://1.1.1.1",
        ] {
            assert!(destinations.check(url).is_ok(), "{url}");
        }
        for url in [
            "http://hooks.example/",
            "ftp://hooks.example/",
            "https://hooks.example:8443/",
            "https://other.example/",
            "https://hooks.example./",
            "https://a.hooks.example/",
            "https://hooks.example.evil.example/",
            "https://evil.example/?hooks.example",
            "https://hooks.example@evil.example/",
            "https://evil.example\\@hooks.example/",
            "https://user@hooks.example/",
            "https://user:word@hooks.example/",
            "https://hooks.example/#part",
            "https://hooks.example%2eevil.example/",
            "//hooks.example/",
            "hooks.example",
            "file:///etc/passwd",
            "",
            &format!("https://hooks.example/{}", "x".repeat(MAX_URL_BYTES)),
        ] {
            assert_eq!(destinations.check(url).unwrap_err().code(), Code::CallbackNotAllowed, "{url}");
        }
    }

    #[test]
    fn without_a_list_nobody_is_called() {
        let error = Destinations::default().check("https://hooks.example/").unwrap_err();
        assert!(error.message().contains("WEBHOOK_HOSTS"), "{error}");
    }

    /// As attackers write 127.0.0.1, 169.254.169.254 and 10.0.0.1.
    const NOTATIONS: [&str; 22] = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.1.",
        "%31%32%37.0.0.1",
        "１２７.0.0.1",
        "127。0。0。1",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a00:1::1]",
        "169.254.169.254",
        "0xa9fea9fe",
    ];

    #[test]
    fn no_notation_of_a_private_address_can_be_listed_or_called() {
        for host in NOTATIONS {
            let error = destinations(host, "prod").unwrap_err();
            assert_eq!(error.name, "WEBHOOK_HOSTS", "{host}");
            for listed in [destinations("hooks.example", "prod"), destinations("hooks.example", "")] {
                let refused = listed.unwrap().check(&format!("https://{host}/")).unwrap_err();
                assert_eq!(refused.code(), Code::CallbackNotAllowed, "{host}");
            }
        }
    }

    /// An address in every notation that a URL's host may have for it, or may be taken for it.
    fn notations(address: Ipv4Addr) -> Vec<String> {
        let [a, b, c, d] = address.octets();
        let whole = address.to_bits();
        let (last3, last2) = (whole & 0xff_ffff, whole & 0xffff);
        let (high, low) = (whole >> 16, last2);
        let mut notations = Vec::new();
        for dot in ["", "."] {
            notations.extend([
                format!("{a}.{b}.{c}.{d}{dot}"),
                format!("{whole}{dot}"),
                format!("{whole:#x}{dot}"),
                format!("{whole:#X}{dot}").replace('X', "x"),
                format!("0{whole:o}{dot}"),
                format!("{a}.{last3}{dot}"),
                format!("{a}.{b}.{last2}{dot}"),
                format!("{a:#x}.{b:#x}.{c:#x}.{d:#x}{dot}"),
                format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}{dot}"),
                format!("000{a:o}.{b:#x}.{last2}{dot}"),
                format!("{a:#x}.{last3:#x}{dot}"),
                format!("{a}%2e{b}%2e{c}%2e{d}{dot}"),
                format!("{a}\u{3002}{b}\u{3002}{c}\u{3002}{d}{dot}"),
            ]);
        }
        notations.extend([
            format!("[::ffff:{address}]"),
            format!("[::ffff:{high:x}:{low:x}]"),
            format!("[0:0:0:0:0:ffff:{high:04x}:{low:04x}]"),
            format!("[::{address}]"),
            format!("[64:ff9b::{address}]"),
            format!("[64:ff9b:1::{high:x}:{low:x}]"),
            format!("[2002:{high:x}:{low:x}::1]"),
            format!("[2001:0:{high:x}:{low:x}::1]"),
            format!("[fe80::5efe:{address}]"),
        ]);
        notations
    }

    #[test]
    fn no_private_network_can_be_named_in_any_notation() {
        let listed = [destinations("hooks.example", "prod").unwrap(), destinations("hooks.example", "").unwrap()];
        let mut tried = 0;
        for (network, length) in NOT_PUBLIC_V4 {
            let last = Ipv4Addr::from_bits(network.to_bits() | u32::MAX.checked_shr(length).unwrap_or(0));
            let middle = Ipv4Addr::from_bits(network.to_bits() | (u32::MAX.checked_shr(length).unwrap_or(0) / 3));
            for address in [network, middle, last] {
                for host in notations(address) {
                    tried += 1;
                    let refused = destinations(&host, "prod").unwrap_err();
                    assert_eq!(refused.name, "WEBHOOK_HOSTS", "{host}");
                    for scheme in ["https", "http"] {
                        for listed in &listed {
                            let refused = listed.check(&format!("{scheme}://{host}/")).unwrap_err();
                            assert_eq!(refused.code(), Code::CallbackNotAllowed, "{host}");
                        }
                    }
                    // What a name server may answer.
                    if let Some(address) = literal(&host) {
                        assert!(!is_public(address), "{host}");
                        assert!(!listed[0].permits("hooks.example", address), "{host}");
                    }
                }
            }
        }
        assert_eq!(tried, NOT_PUBLIC_V4.len() * 3 * 35);
        // A public address in the same clothes: where it is read as the address it is called, and where it is not
        // it is refused, so the notations above were refused for what they are.
        let public = destinations("1.1.1.1", "prod").unwrap();
        let called = notations(Ipv4Addr::new(1, 1, 1, 1)).into_iter();
        let called = called.filter(|host| public.check(&format!("https://{host}/")).is_ok()).count();
        assert_eq!(called, 26);
    }

    #[test]
    fn this_machine_is_called_on_the_local_stage_alone_and_by_its_own_name() {
        for stage in ["", "local"] {
            let local = destinations("127.0.0.1:9000,localhost,[::1]:9000,hooks.example", stage).unwrap();
            for url in ["http://127.0.0.1:9000/a", "http://0x7f.1:9000", "https://localhost/", "http://[::1]:9000/"] {
                assert!(local.check(url).is_ok(), "{url}");
            }
            for url in
                ["http://127.0.0.1/", "http://127.0.0.2:9000/", "http://hooks.example/", "http://localhost:9000/"]
            {
                assert!(local.check(url).is_err(), "{url}");
            }
            for host in ["10.0.0.1", "192.168.1.7", "169.254.169.254", "[fd00::1]", "[::ffff:127.0.0.1]", "0.0.0.0"] {
                assert!(destinations(host, stage).is_err(), "{host}");
            }
            let loopback: IpAddr = "127.0.0.1".parse().unwrap();
            assert!(local.permits("localhost", loopback));
            assert!(!local.permits("hooks.example", loopback), "a name that resolves to this machine");
            assert!(!local.permits("localhost", "10.0.0.1".parse().unwrap()));
            assert!(local.permits("hooks.example", "1.1.1.1".parse().unwrap()));
        }
        for host in ["127.0.0.1:9000", "[::1]"] {
            assert!(destinations(host, "prod").is_err(), "{host}");
        }
        let elsewhere = destinations("localhost", "prod").unwrap();
        assert!(elsewhere.check("http://localhost/").is_err());
        assert!(!elsewhere.permits("localhost", "127.0.0.1".parse().unwrap()));
    }

    #[test]
    fn what_is_no_host_keeps_the_process_from_starting() {
        for hosts in
            ["https://hooks.example", "hooks.example/path", "a b", "user@hooks.example", "hooks.example:x", ":443", "?"]
        {
            assert_eq!(destinations(hosts, "prod").unwrap_err().name, "WEBHOOK_HOSTS", "{hosts}");
        }
    }
}
