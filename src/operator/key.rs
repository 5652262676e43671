//! Tokens and authorities of jobs, made from one key: the operator never has to read a secret of a user's namespace.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use sha2::{Digest, Sha256};

use super::OperatorError;

/// The secret in the operator's own namespace that holds the key.
const NAME: &str = "foreshard-operator-key";
const FIELD: &str = "key";

/// The operator's key; the first operator of a cluster makes it.
pub async fn read_or_make(client: &Client, namespace: &str) -> Result<Vec<u8>, OperatorError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failed = |verb| move |source| OperatorError::Api { verb, what: format!("secret {NAME}"), source };
    // Where another operator makes it at the same time, its key is read in the second round.
    for _ in 0..2 {
        if let Some(secret) = api.get_opt(NAME).await.map_err(failed("read"))? {
            let key = secret.data.as_ref().and_then(|d| d.get(FIELD)).map(|b| b.0.clone());
            return key.ok_or_else(|| OperatorError::Incomplete(format!("secret {}", secret.name_any()), FIELD));
        }
        let secret = Secret {
            metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
            data: Some([(FIELD.to_owned(), ByteString(random()))].into()),
            ..Secret::default()
        };
        match api.create(&PostParams::default(), &secret).await {
            Ok(_) => {}
            Err(kube::Error::Api(e)) if e.reason == "AlreadyExists" => {}
            Err(e) => return Err(failed("create")(e)),
        }
    }
    Err(OperatorError::Incomplete(format!("secret {NAME}"), FIELD))
}

/// 256 random bits from the kernel.
fn random() -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![0u8; 32];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).expect("Linux has random bytes");
    bytes
}

/// The secret that the pods of one job share.
pub fn token(key: &[u8], uid: &str) -> String {
    derived(key, "token", uid).iter().map(|b| format!("{b:02x}")).collect()
}

/// What the certificate authority of one job is made from; it never leaves the operator.
pub fn authority(key: &[u8], uid: &str) -> [u8; 32] {
    derived(key, "authority", uid)
}

/// Hashed twice with the key in front, so that nothing can be appended.
fn derived(key: &[u8], purpose: &str, uid: &str) -> [u8; 32] {
    let inner = Sha256::new().chain_update(key).chain_update(purpose).chain_update([0]).chain_update(uid).finalize();
    Sha256::new().chain_update(key).chain_update(inner).finalize().into()
}
