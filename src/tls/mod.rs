//! Who is who inside a job: every job has a certificate authority of its own, and both ends of a connection show what it
//! has issued to them (docs/decisions/0013).
//!
//! # Guarantees
//! A [`Stream`] made with an [`Identity`] is encrypted (TLS 1.3), and its peer is part of the same job. A dialling side knows
//! whom it has reached; a listening side asks with [`Stream::is`]. Without an identity a stream is plain TCP: processes of
//! one machine know each other by a token alone.
//!
//! `tls` knows nothing of what is said.

mod issue;
mod stream;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, ClientConfig, CommonState, RootCertStore, ServerConfig};

pub use self::issue::{Authority, Certificate};
pub use self::stream::{Reader, Stream, Writer};

/// Files of an identity, in a directory: the authority's certificate, one's own, and its key.
pub const FILES: [&str; 3] = ["ca.crt", "tls.crt", "tls.key"];

/// Part of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    Operator,
    Head,
    Worker(u32),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Operator => write!(f, "operator"),
            Name::Head => write!(f, "head"),
            Name::Worker(n) => write!(f, "worker-{n}"),
        }
    }
}

impl Name {
    pub fn server(self) -> ServerName<'static> {
        ServerName::try_from(self.to_string()).expect("names are DNS labels")
    }
}

/// Certificates that cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {message}")]
    Read { path: PathBuf, message: String },
    #[error("certificate and key cannot be used")]
    Unusable(#[source] rustls::Error),
    #[error("cannot issue a certificate")]
    Issue(#[source] rcgen::Error),
}

/// Why a connection is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("its certificate is not of this job")]
    OtherJob,
    #[error("its certificate has expired, or its time has not come; do the clocks agree?")]
    Expired,
    #[error("its certificate is not that of {expected}")]
    OtherName { expected: String },
    #[error("it shows no certificate")]
    Nameless,
    #[error("it refuses this side's certificate: {0}")]
    RefusesUs(&'static str),
    #[error("it does not speak TLS")]
    NotTls,
    #[error("TLS: {0}")]
    Other(rustls::Error),
}

impl From<rustls::Error> for Refusal {
    fn from(e: rustls::Error) -> Self {
        use CertificateError::{Expired, ExpiredContext, NotValidForName, NotValidForNameContext};
        use CertificateError::{NotValidYet, NotValidYetContext};
        match &e {
            rustls::Error::InvalidCertificate(
                Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
            ) => Refusal::Expired,
            rustls::Error::InvalidCertificate(NotValidForNameContext { expected, .. }) => {
                Refusal::OtherName { expected: expected.to_str().into_owned() }
            }
            rustls::Error::InvalidCertificate(NotValidForName) => {
                Refusal::OtherName { expected: "this peer".to_owned() }
            }
            rustls::Error::InvalidCertificate(_) => Refusal::OtherJob,
            rustls::Error::NoCertificatesPresented => Refusal::Nameless,
            rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => Refusal::RefusesUs("it has expired"),
            rustls::Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
                Refusal::RefusesUs("it is of another job")
            }
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => Refusal::RefusesUs("there is none"),
            rustls::Error::AlertReceived(AlertDescription::BadCertificate | AlertDescription::CertificateUnknown) => {
                Refusal::RefusesUs("it is of somebody else")
            }
            rustls::Error::InvalidMessage(_) => Refusal::NotTls,
            _ => Refusal::Other(e),
        }
    }
}

impl From<Refusal> for std::io::Error {
    fn from(refusal: Refusal) -> Self {
        std::io::Error::new(std::io::ErrorKind::InvalidData, refusal)
    }
}

/// Whether a connection failed because one end does not trust the other: trying again is of no use.
pub fn is_refusal(e: &std::io::Error) -> bool {
    e.get_ref().is_some_and(|inner| inner.is::<Refusal>())
}

/// A failed handshake, with a [`Refusal`] inside where one end does not trust the other.
pub fn refusal(e: std::io::Error) -> std::io::Error {
    match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner) => Refusal::from(inner.clone()).into(),
        None => e,
    }
}

/// Whether the peer's certificate is that of `name`.
pub fn shows(connection: &CommonState, name: Name) -> Result<(), Refusal> {
    let shown = connection.peer_certificates().and_then(|c| c.first()).ok_or(Refusal::Nameless)?;
    let parsed = ParsedCertificate::try_from(shown).map_err(Refusal::from)?;
    let same = rustls::client::verify_server_name(&parsed, &name.server());
    same.map_err(|_| Refusal::OtherName { expected: name.to_string() })
}

/// Compares without telling by its duration how much was right.
pub fn same_token(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// What a part of a job shows to the others, and how it knows them.
#[derive(Clone)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity")
    }
}

impl Identity {
    /// From [`FILES`] in a directory.
    pub fn read(directory: &Path) -> Result<Self, TlsError> {
        let [ca, certificate, key] = FILES.map(|f| directory.join(f));
        fn read<T: PemObject>(path: &Path) -> Result<T, TlsError> {
            T::from_pem_file(path).map_err(|e| TlsError::Read { path: path.to_owned(), message: format!("{e:?}") })
        }
        Self::new(read(&ca)?, read(&certificate)?, read(&key)?)
    }

    pub(crate) fn new(
        authority: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = &[&rustls::version::TLS13];
        let mut roots = RootCertStore::empty();
        roots.add(authority).map_err(TlsError::Unusable)?;
        let roots = Arc::new(roots);
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(TlsError::Unusable)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(vec![certificate.clone()], key.clone_key())
            .map_err(TlsError::Unusable)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build();
        let verifier = verifier.map_err(|e| TlsError::Unusable(rustls::Error::General(e.to_string())))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(TlsError::Unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)
            .map_err(TlsError::Unusable)?;
        // Nobody comes back: connections last as long as a plan.
        server.send_tls13_tickets = 0;
        client.resumption = Resumption::disabled();
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// For an asynchronous client that speaks one of these protocols (ALPN).
    pub fn client(&self, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        let mut config = (*self.client).clone();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        Arc::new(config)
    }

    /// For an asynchronous server that speaks one of these protocols, and whatever a client speaks that names none.
    pub fn server(&self, protocols: &[&[u8]]) -> Arc<ServerConfig> {
        let mut config = (*self.server).clone();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        Arc::new(config)
    }
}
