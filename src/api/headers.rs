//! Response headers that change or are long are marked as never to be indexed (RFC 7541 §7.1.3): what is indexed stays in a table of
//! its connection for as long as that lives. The date alone, left to the HTTP server, is a new entry every second in which something is
//! answered, 14 KiB a connection in the end; a refusal's text and details are another.

use std::sync::{Mutex, PoisonError};

use http::header::{DATE, HeaderName};
use http::{HeaderValue, Response};
use time::OffsetDateTime;

/// What a refusal says (gRPC over HTTP/2, Responses; richer error model).
const REFUSAL: [HeaderName; 2] = [HeaderName::from_static("grpc-message"), HeaderName::from_static("grpc-status-details-bin")];

/// The second that was written last, and how.
static WRITTEN: Mutex<(i64, HeaderValue)> = Mutex::new((i64::MIN, HeaderValue::from_static("")));

/// The response with the time of now (RFC 9110 §6.6.1), and nothing in it that a connection would keep.
pub(super) fn unindexed<B>(mut response: Response<B>) -> Response<B> {
    let headers = response.headers_mut();
    headers.insert(DATE, date(OffsetDateTime::now_utc()));
    for name in REFUSAL.iter().chain([&DATE]) {
        if let Some(value) = headers.get_mut(name) {
            value.set_sensitive(true);
        }
    }
    response
}

/// Written once a second, not for each response.
fn date(now: OffsetDateTime) -> HeaderValue {
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    if written.0 != now.unix_timestamp()
        && let Ok(value) = HeaderValue::try_from(text(now))
    {
        *written = (now.unix_timestamp(), value);
    }
    written.1.clone()
}

/// IMF-fixdate (RFC 9110 §5.6.7).
fn text(now: OffsetDateTime) -> String {
    let (mut weekday, mut month) = (now.weekday().to_string(), now.month().to_string());
    weekday.truncate(3);
    month.truncate(3);
    let (day, year) = (now.day(), now.year());
    format!("{weekday}, {day:02} {month} {year:04} {:02}:{:02}:{:02} GMT", now.hour(), now.minute(), now.second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_as_http_wants_it() {
        let at = |seconds| text(OffsetDateTime::from_unix_timestamp(seconds).unwrap());
        assert_eq!(at(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(at(1_800_000_000), "Fri, 15 Jan 2027 08:00:00 GMT");
    }

    #[test]
    fn the_date_moves_on_with_the_second() {
        let at = |seconds| date(OffsetDateTime::from_unix_timestamp(seconds).unwrap());
        assert_ne!(at(784_111_777), at(784_111_778));
        assert_eq!(at(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
    }

    #[test]
    fn a_refusal_leaves_nothing_in_the_tables_of_its_connection() {
        let refused =
            unindexed(tonic::Status::with_details(tonic::Code::ResourceExhausted, "later", vec![1].into()).into_http::<()>());
        for name in ["date", "grpc-message", "grpc-status-details-bin"] {
            assert!(refused.headers()[name].is_sensitive(), "{name}");
        }
    }
}
