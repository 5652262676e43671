//! `s3://` URLs: a GET is signed for a moment, and what is fetched then is an archive as any other.

use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{BackoffConfig, RetryConfig};
use reqwest::Method;
use url::Url;

use super::get::shown;
use super::{FetchError, Settings};

pub const SCHEME: &str = "s3";
/// The request follows at once.
const HOLDS: Duration = Duration::from_secs(300);
/// Without a key, the machine is asked for one: on most there is nobody who answers.
const PATIENCE: Duration = Duration::from_secs(10);

/// The URL of an object over HTTP(S), with a signature in its query.
pub async fn signed(url: &Url, settings: &Settings) -> Result<Url, FetchError> {
    let sign = async {
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: 1, retry_timeout: PATIENCE };
        let mut store = AmazonS3Builder::new().with_url(url.as_str()).with_retry(retry);
        for (name, value) in settings {
            let name = name.to_ascii_lowercase();
            if let Some(key) = name.starts_with("aws_").then(|| name.parse::<AmazonS3ConfigKey>().ok()).flatten() {
                store = store.with_config(key, value);
            }
        }
        let path = Path::from_url_path(url.path())?;
        store.build()?.signed_url(Method::GET, &path, HOLDS).await
    };
    sign.await.map_err(|e| FetchError::NotSigned { url: shown(url.as_str()), why: e.to_string() })
}
