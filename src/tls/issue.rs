//! The authority of a job and what it issues.

use std::ops::Range;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, date_time_ymd,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Identity, Name, TlsError};

/// A certificate with its key and the authority's certificate, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    pub authority: String,
    pub certificate: String,
    pub key: String,
}

/// The certificate authority of one job.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// An Ed25519 key in PKCS#8, up to its 32 bytes (RFC 8410, section 7).
const ED25519: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// Times are bounded by this one, the year 2200.
const LATEST: i64 = 7_258_118_400;

impl Authority {
    /// The same `seed` and `job` make the same authority: nothing has to be kept.
    ///
    /// # Units
    /// `valid`: seconds since the Unix epoch.
    pub fn new(seed: &[u8; 32], job: &str, valid: Range<i64>) -> Result<Self, TlsError> {
        let pkcs8 = PrivatePkcs8KeyDer::from([&ED25519[..], seed].concat());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &PKCS_ED25519).map_err(TlsError::Issue)?;
        let mut params = params(&format!("foreshard job {job}"), &valid);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, key).map_err(TlsError::Issue)? })
    }

    /// A certificate for a part of the job, with a new key.
    pub fn issue(&self, name: Name, valid: Range<i64>) -> Result<Certificate, TlsError> {
        let (certificate, key) = self.certify(name, &valid)?;
        Ok(Certificate { authority: self.issuer.pem(), certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The same, to be used here.
    pub fn identity(&self, name: Name, valid: Range<i64>) -> Result<Identity, TlsError> {
        let (certificate, key) = self.certify(name, &valid)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Identity::new(self.issuer.der().clone(), certificate.der().clone(), key)
    }

    fn certify(&self, name: Name, valid: &Range<i64>) -> Result<(rcgen::Certificate, KeyPair), TlsError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(TlsError::Issue)?;
        let mut params = params(&name.to_string(), valid);
        let alt = name.to_string().try_into().map_err(TlsError::Issue)?;
        params.subject_alt_names = vec![rcgen::SanType::DnsName(alt)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Workers dial and are dialled.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(TlsError::Issue)?;
        Ok((certificate, key))
    }
}

fn params(name: &str, valid: &Range<i64>) -> CertificateParams {
    let at = |seconds: i64| date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds.clamp(0, LATEST) as u64);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (at(valid.start), at(valid.end));
    params
}
