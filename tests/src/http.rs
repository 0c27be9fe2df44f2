//! Just enough HTTP for admin servers.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, anyhow};

use crate::PATIENCE;

/// Asks the server at an address for a path and returns the whole response, head and body.
///
/// # Errors
///
/// Returns an error if the server does not answer.
pub fn http_get(address: &str, path: &str) -> Result<String> {
    exchange(address, &format!("GET {path}"), "")
}

/// Sends JSON to a path of the server at an address and returns the whole response, head and body.
///
/// # Errors
///
/// Returns an error if the server does not answer.
pub fn http_post(address: &str, path: &str, json: &str) -> Result<String> {
    exchange(address, &format!("POST {path}"), json)
}

fn exchange(address: &str, request: &str, body: &str) -> Result<String> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!("{request} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {length}");
    write!(stream, "{head}\r\nconnection: close\r\n\r\n{body}")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    Ok(response)
}

/// Returns the sum of the series of a metric that have these labels, as in `state="used"`; 0 if
/// there are none.
///
/// # Errors
///
/// Returns an error if the admin server does not answer, or not with numbers.
pub fn metric(address: &str, name: &str, labels: &[&str]) -> Result<f64> {
    let text = http_get(address, "/metrics")?;
    text.lines()
        .filter(|line| {
            let labelled = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            labelled.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
        })
        .map(|line| {
            let value = line.rsplit(' ').next().unwrap_or_default();
            value.parse::<f64>().map_err(|error| anyhow!("{line}: {error}"))
        })
        .sum()
}
