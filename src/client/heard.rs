//! What TLS hears of a peer after the handshake, kept for who asks why a call has failed: HTTP/2 hands on no more of an error than its text.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::Status;

use super::Error;
use super::error::rustls_error;

/// Where a channel leads, and the alert that its newest connection ended with, if it did (RFC 8446 §6).
#[derive(Debug, Clone)]
pub struct Place {
    address: String,
    alert: Arc<Mutex<Option<rustls::Error>>>,
}

impl Place {
    pub(super) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), alert: Arc::default() }
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sorts what a call over the channel ended in.
    #[must_use]
    pub fn failed(&self, status: &Status) -> Error {
        match (Error::of_status(status, &self.address), self.alert().as_ref()) {
            (Error::Unreachable { .. }, Some(alert)) => Error::of_tls(alert, &self.address),
            (error, _) => error,
        }
    }

    /// A connection from here on; nothing is left of one that was before.
    pub(super) fn listen<Io>(&self, io: Io) -> Listening<Io> {
        *self.alert() = None;
        Listening { io, place: self.clone() }
    }

    fn alert(&self) -> std::sync::MutexGuard<'_, Option<rustls::Error>> {
        self.alert.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection after its handshake. In TLS 1.3 the client's has ended before the server judges its certificate: the first read tells.
pub(super) struct Listening<Io> {
    io: Io,
    place: Place,
}

impl<Io> Listening<Io> {
    fn heard<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &polled
            && let Some(alert @ rustls::Error::AlertReceived(_)) = rustls_error(error)
        {
            *self.place.alert() = Some(alert.clone());
        }
        polled
    }
}

impl<Io: AsyncRead + Unpin> Listening<Io> {
    /// Whoever closes after an alert takes nothing more: a write may fail before the alert was read.
    fn sent<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(polled, Poll::Ready(Err(_))) {
            let mut rest = [0; 1024];
            let last = Pin::new(&mut self.io).poll_read(context, &mut ReadBuf::new(&mut rest));
            let _ = self.heard(last);
        }
        polled
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Listening<Io> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(context, buffer);
        self.heard(polled)
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Listening<Io> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(context, bytes);
        self.sent(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_flush(context);
        self.sent(context, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(context, bytes);
        self.sent(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
