//! One GET: bounded in time, size and redirects, and of a known digest or not at all.

use std::error::Error;
use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::redirect::Policy;
use sha2::{Digest, Sha256};
use url::Url;

use super::s3::{SCHEME, signed};
use super::{FetchError, Settings, write};
use crate::api::Archive;

const CONNECT: Duration = Duration::from_secs(15);
/// Longest pause between two pieces.
const STALL: Duration = Duration::from_secs(60);
/// All of it: heads and workers wait for each other for half an hour.
const WHOLE: Duration = Duration::from_secs(1500);
/// Object stores and mirrors send elsewhere once or twice.
const REDIRECTS: usize = 5;

/// Writes what lies at the URL to `file`, and goes back to its beginning. Returns its bytes.
pub fn get(archive: &Archive, settings: &Settings, limit: u64, file: &mut File) -> Result<u64, FetchError> {
    let url =
        Url::parse(&archive.url).map_err(|e| FetchError::NotUrl { url: shown(&archive.url), why: e.to_string() })?;
    let no_client = |e: &dyn Error| FetchError::NoClient(causes(e));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| no_client(&e))?;
    // Nothing is unpacked on the way: the digest is that of the archive itself.
    let client = reqwest::Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(STALL)
        .timeout(WHOLE)
        .redirect(redirects())
        .no_gzip()
        .no_deflate()
        .no_brotli()
        .no_zstd()
        .build()
        .map_err(|e| no_client(&e.without_url()))?;
    let (found, bytes) = runtime.block_on(async {
        let at = if url.scheme() == SCHEME { signed(&url, settings).await? } else { url.clone() };
        download(&client, &url, at, limit, file).await
    })?;
    if found != archive.sha256 {
        let (url, expected) = (shown(&archive.url), archive.sha256.clone());
        return Err(FetchError::OtherDigest { url, bytes, found, expected });
    }
    file.rewind().map_err(|source| write(Path::new("the archive"), source))?;
    Ok(bytes)
}

/// Digest in hex, and bytes, of what lies `at` a URL that people know as `url`.
async fn download(
    client: &reqwest::Client,
    url: &Url,
    at: Url,
    limit: u64,
    file: &mut File,
) -> Result<(String, u64), FetchError> {
    let url = || shown(url.as_str());
    let broken = |e: reqwest::Error| FetchError::Unreachable { url: url(), why: why(e) };
    let mut answer = client.get(at).send().await.map_err(broken)?;
    let status = answer.status();
    if status != StatusCode::OK {
        return Err(FetchError::Status { url: url(), status: status.to_string(), hint: hint(status) });
    }
    let too_large = || FetchError::TooLarge { url: url(), limit };
    let expected = answer.content_length();
    if expected.is_some_and(|n| n > limit) {
        return Err(too_large());
    }
    let (mut digest, mut bytes) = (Sha256::new(), 0u64);
    loop {
        let piece = match answer.chunk().await {
            Ok(Some(piece)) => piece,
            Ok(None) => break,
            Err(e) if !e.is_timeout() && expected.is_some_and(|n| bytes < n) => {
                return Err(FetchError::CutShort { url: url(), found: bytes, expected: expected.unwrap_or_default() });
            }
            Err(e) => return Err(broken(e)),
        };
        bytes += piece.len() as u64;
        if bytes > limit {
            return Err(too_large());
        }
        digest.update(&piece);
        file.write_all(&piece).map_err(|source| write(Path::new("the archive"), source))?;
    }
    let digest = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok((digest, bytes))
}

/// What began encrypted stays so.
fn redirects() -> Policy {
    Policy::custom(|attempt| {
        let before = attempt.previous().last();
        if attempt.previous().len() > REDIRECTS {
            attempt.error(format!("sent elsewhere more than {REDIRECTS} times"))
        } else if before.is_some_and(|b| b.scheme() == "https") && attempt.url().scheme() != "https" {
            attempt.error("sent from https to http; name the place it leads to")
        } else {
            attempt.follow()
        }
    })
}

fn hint(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 | 403 => {
            "it may not be read; the credentials of an s3:// url may be wrong, and a presigned URL may have run out: set a new \
             one, sha256 stays"
        }
        404 | 410 => "nothing lies there; correct the URL, or put the archive there",
        429 | 500..=599 => "the server is busy or broken; the next try may go better",
        _ => "an archive is answered with 200",
    }
}

/// A URL for people: without what may be secret.
pub fn shown(url: &str) -> String {
    let Ok(mut parsed) = Url::parse(url) else {
        return url.split(['?', '#', '@']).next().unwrap_or_default().to_owned();
    };
    parsed.set_query(None);
    parsed.set_fragment(None);
    let _ = parsed.set_username("");
    let _ = parsed.set_password(None);
    parsed.into()
}

fn why(e: reqwest::Error) -> String {
    let what = if e.is_timeout() {
        "took too long"
    } else if e.is_connect() {
        "cannot be reached"
    } else if e.is_redirect() {
        "leads too far"
    } else {
        "cannot be read"
    };
    format!("{what}: {}", causes(&e.without_url()))
}

/// The innermost cause says what has happened.
fn causes(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
