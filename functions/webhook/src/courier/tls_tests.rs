//! A receiver over TLS, with certificates that openssl makes for the test.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use reqwest::Certificate;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::tests::{SECRET, Scripted, destinations, send};
use super::*;

const CA: &str = "
[ca]
default_ca = test
[test]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = name
copy_extensions = copy
unique_subject = no
[name]
commonName = supplied
";

/// Runs openssl in this folder; its arguments are separated by spaces.
fn openssl(folder: &Path, arguments: &str) {
    let done = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
    let done = done.expect("openssl is missing: run scripts/test");
    assert!(done.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A folder with the certificates of two authorities, and leaves: name, subject, authority, dates.
fn certificates(folder: &Path, leaves: &[(&str, &str, &str, &str)]) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for (file, text) in [("ca.cnf", CA), ("index.txt", ""), ("serial", "01")] {
        std::fs::write(folder.join(file), text).unwrap();
    }
    for authority in ["ca", "other-ca"] {
        openssl(
            folder,
            &format!("req -x509 {key} -keyout {authority}.key -out {authority}.pem -subj /CN={authority} -days 2"),
        );
    }
    for (name, host, authority, dates) in leaves {
        let names = format!("-subj /CN={host} -addext subjectAltName=DNS:{host}");
        if *authority == "itself" {
            openssl(folder, &format!("req -x509 {key} -keyout {name}.key -out {name}.pem {names} -days 2"));
            continue;
        }
        openssl(folder, &format!("req {key} -keyout {name}.key -out {name}.csr {names}"));
        let by = format!("-cert {authority}.pem -keyfile {authority}.key");
        openssl(folder, &format!("ca -batch -notext -config ca.cnf {by} {dates} -in {name}.csr -out {name}.pem"));
    }
}

/// A receiver with this certificate; what it is sent once it has shaken hands.
fn receiver(folder: &Path, name: &str) -> (u16, Arc<Mutex<Vec<String>>>) {
    let chain = vec![CertificateDer::from_pem_file(folder.join(format!("{name}.pem"))).unwrap()];
    let key = PrivateKeyDer::from_pem_file(folder.join(format!("{name}.key"))).unwrap();
    let config = Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, requests) = (listener.local_addr().unwrap().port(), Arc::default());
    let kept: Arc<Mutex<Vec<String>>> = Arc::clone(&requests);
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut stream = StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), stream);
            let (mut request, mut part) = (Vec::new(), [0; 4096]);
            // A body ends with the last brace of its JSON.
            while !request.ends_with(b"}") {
                match stream.read(&mut part) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&part[..read]),
                }
            }
            if !request.is_empty() {
                kept.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
            }
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").and_then(|()| stream.flush());
        }
    });
    (port, requests)
}

#[tokio::test]
async fn a_receiver_over_tls_is_told_only_by_its_own_certificate_of_a_known_authority() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let leaves = [
        ("good", "localhost", "ca", "-days 2"),
        ("elsewhere", "hooks.example", "ca", "-days 2"),
        ("expired", "localhost", "ca", "-startdate 20200101000000Z -enddate 20200102000000Z"),
        ("early", "localhost", "ca", "-startdate 20980101000000Z -enddate 20990101000000Z"),
        ("stranger", "localhost", "other-ca", "-days 2"),
        ("self-signed", "localhost", "itself", ""),
    ];
    certificates(folder, &leaves);
    let trusted = Certificate::from_pem(&std::fs::read(folder.join("ca.pem")).unwrap()).unwrap();
    for (name, ..) in leaves {
        let (port, requests) = receiver(folder, name);
        let host = format!("localhost:{port}");
        let (names, _) = Scripted::new(&[&["127.0.0.1"]]);
        let client = Client::builder().tls_certs_only([trusted.clone()]);
        let key = Key::Fixed(Some(SECRET.into()));
        let courier = Courier::over(client, destinations(&host, "local"), key, names).unwrap();
        let found = send(&courier, &format!("https://{host}/hook")).await;
        let requests = requests.lock().unwrap();
        if name == "good" {
            assert_eq!((&found, requests.len()), (&Ok(()), 1), "{name}");
            assert!(requests[0].starts_with("POST /hook HTTP/1.1\r\n") && requests[0].contains("webhook-signature"));
        } else {
            assert_eq!(found.as_ref().map_err(|refusal| refusal.code), Err("callback_unreachable"), "{name}");
            assert!(found.unwrap_err().cause.contains("certificate"), "{name}");
            assert_eq!(*requests, [] as [&str; 0], "{name}: it was told something");
        }
    }
}
