//! Where a job's files come from on a cluster.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::quantity;

/// One place files come from; exactly one source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "[has(self.configMap), has(self.persistentVolumeClaim), has(self.image), has(self.archive)].exists_one(x, x)",
    "message": "a volume has exactly one of configMap, persistentVolumeClaim, image and archive"
}]))]
pub struct Volume {
    /// Name of its directory.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMap>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<Claim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<Archive>,
}

impl Volume {
    /// What no schema tells where there is no API server.
    pub fn check(&self) -> Result<(), String> {
        let Some(archive) = &self.archive else { return Ok(()) };
        archive.check().map_err(|e| format!("spec.volumes[{}].archive.{e}", self.name))
    }
}

/// For what is smaller than 1 MiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigMap {
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Keys cannot hold a `/`: which key lies where. Every key under its own name when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["key"]))]
    pub items: Vec<Item>,
}

/// A key of a config map, and where it lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Item {
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    #[schemars(length(min = 1, max = 1024))]
    pub path: String,
}

/// A volume of the job's namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Claim {
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// An OCI image or artifact, mounted read-only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    #[schemars(length(min = 1, max = 1024))]
    pub reference: String,
}

/// A tar archive, plain or packed by gzip, that is fetched over HTTP(S) or from S3 and unpacked into the volume before training
/// begins. The volume cannot be written to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.sizeLimit) || (isQuantity(self.sizeLimit) && quantity(self.sizeLimit).isGreaterThan(quantity('0')))",
        "message": "sizeLimit is a quantity above 0, such as 4Gi or 512Mi"
    },
    {
        "rule": "self.sha256 == oldSelf.sha256",
        "message": "sha256 cannot change once a job exists: all its workers train the same model; make another job"
    },
    {
        "rule": "!has(self.credentials) || self.url.startsWith('s3://')",
        "message": "credentials are for an s3:// url; leave them out, or write the url as s3://BUCKET/KEY"
    }
]))]
pub struct Archive {
    /// `https://...`, or `http://...`: what is taken is told by sha256 alone; in an object store, the public or the presigned
    /// URL of the object. Or `s3://BUCKET/KEY`, with credentials. May be renewed while the job exists.
    #[schemars(length(min = 1, max = 4096), regex(pattern = URL))]
    pub url: String,
    /// Digest of the archive in hexadecimal, as `sha256sum FILE` prints it. Nothing is unpacked that has another.
    #[schemars(length(min = 64, max = 64), regex(pattern = "^[0-9a-f]{64}$"))]
    pub sha256: String,
    /// On a cluster, of an `s3://` url: a secret of the job's namespace whose entries are what the object store wants to see,
    /// such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT. `foreshard local run` takes them from its
    /// own environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials: Option<String>,
    /// Most that the archive, and what it unpacks to, may take; 4Gi when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub size_limit: Option<String>,
}

const URL: &str = r"^(https?://[^/?#\s]+[^\s]*|s3://[^/?#\s]+/[^/?#\s][^?#\s]*)$";
const S3: &str = "s3://";
const SIZE_LIMIT: u64 = 4 << 30;

impl Archive {
    /// `size_limit` in bytes.
    pub fn limit(&self) -> Result<u64, String> {
        let Some(text) = &self.size_limit else { return Ok(SIZE_LIMIT) };
        match quantity(text) {
            Some(n) if n >= 1.0 => Ok(n as u64),
            _ => Err(format!("sizeLimit: {text:?} is not a quantity above 0; write one like 4Gi or 512Mi")),
        }
    }

    /// What the names of environment variables begin with that hold the credentials of the n-th of a job's volumes, where one
    /// container fetches several archives.
    pub fn prefix(volume: usize) -> String {
        format!("VOLUME_{volume}_")
    }

    fn check(&self) -> Result<(), String> {
        if !["https://", "http://", S3].iter().any(|scheme| self.url.starts_with(scheme)) {
            return Err(format!("url: {:?} begins with none of https://, http:// and s3://", self.url));
        }
        if self.credentials.is_some() && !self.url.starts_with(S3) {
            return Err(format!("credentials: are for {S3}BUCKET/KEY, and url is another; leave them out"));
        }
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            let found = &self.sha256;
            return Err(format!("sha256: {found:?} is not 64 of 0-9 and a-f; take what `sha256sum FILE` prints"));
        }
        self.limit().map(drop)
    }
}
