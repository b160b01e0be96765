//! Fewer, fuller TLS records and system calls.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What may wait to be written; a record of TLS 1.3 holds as much (RFC 8446 §5.1).
const WAITING_BYTES_MAX: usize = 16 * 1024;

/// A stream whose writes wait until its task is polled again. HTTP/2 flushes after a response's headers and data and once more
/// after its trailers, all in one poll: without this that is two records and two system calls, and two wake-ups of the client.
///
/// A flush asks for another poll and is done there, when the task finds nothing more to read: every task that drives an HTTP/2
/// connection reads until then. What waits is written before the stream is shut down, and never more than a record's worth waits.
///
/// Nothing is written before the peer has spoken: a client's preface waits for nothing (RFC 9113 §3.4), and our settings, the window and
/// the acknowledgement of its settings then leave together.
pub(super) struct Gathered<Io> {
    io: Io,
    waiting: Vec<u8>,
    written: usize,
    /// A flush was asked for and not done.
    flush: bool,
    /// Something was read.
    heard: bool,
}

impl<Io: AsyncWrite + Unpin> Gathered<Io> {
    pub(super) fn new(io: Io) -> Self {
        Self { io, waiting: Vec::new(), written: 0, flush: false, heard: false }
    }

    /// Writes what waits.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.waiting.len() {
            let rest = &self.waiting[self.written..];
            let count = ready!(Pin::new(&mut self.io).poll_write(context, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        // Capacity is not kept: most connections are idle most of the time.
        self.waiting = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_flush_now(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        ready!(Pin::new(&mut self.io).poll_flush(context))?;
        self.flush = false;
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<Io> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // What has arrived is read first: its answer joins what waits.
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        self.heard |= buffer.filled().len() > before;
        // The socket may be full: this task is polled again when there is room.
        if read.is_pending()
            && self.flush
            && self.heard
            && let Poll::Ready(Err(error)) = self.poll_flush_now(context)
        {
            return Poll::Ready(Err(error));
        }
        read
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Gathered<Io> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.waiting.len() >= WAITING_BYTES_MAX {
            ready!(self.poll_drain(context))?;
        }
        let before = self.waiting.len();
        for slice in slices {
            let room = WAITING_BYTES_MAX - self.waiting.len();
            self.waiting.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        Poll::Ready(Ok(self.waiting.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_empty() {
            return Pin::new(&mut self.io).poll_flush(context);
        }
        if !self.flush {
            self.flush = true;
            context.waker().wake_by_ref();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush_now(context))?;
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    fn pair(capacity: usize) -> (Gathered<DuplexStream>, DuplexStream) {
        let (near, far) = duplex(capacity);
        (Gathered::new(near), far)
    }

    #[tokio::test]
    async fn nothing_is_written_before_the_peer_has_spoken() {
        let (mut near, mut far) = pair(1024);
        near.write_all(b"settings").await.unwrap();
        near.flush().await.unwrap();
        let waiting = tokio::spawn(async move {
            near.read_u8().await.unwrap();
            near.write_all(b"ack").await.unwrap();
            near.flush().await.unwrap();
            near.read_u8().await
        });
        let mut heard = [0; 16];
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), far.read(&mut heard)).await;
        assert!(early.is_err(), "it was written before the peer spoke");
        far.write_u8(7).await.unwrap();
        assert_eq!(far.read(&mut heard).await.unwrap(), 11);
        assert_eq!(&heard[..11], b"settingsack");
        far.write_u8(8).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap(), 8);
    }

    #[tokio::test]
    async fn two_flushes_of_one_poll_are_written_together_at_the_next() {
        let (mut near, mut far) = pair(1024);
        far.write_u8(1).await.unwrap();
        near.read_u8().await.unwrap();
        near.write_all(b"head").await.unwrap();
        near.flush().await.unwrap();
        near.write_all(b"tail").await.unwrap();
        near.flush().await.unwrap();
        let mut heard = [0; 16];
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), far.read(&mut heard)).await;
        assert!(early.is_err(), "it was written at once");
        let waiting = tokio::spawn(async move { near.read_u8().await });
        assert_eq!(far.read(&mut heard).await.unwrap(), 8);
        assert_eq!(&heard[..8], b"headtail");
        far.write_u8(7).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap(), 7);
    }

    #[tokio::test]
    async fn what_waits_is_written_before_the_end() {
        let (mut near, mut far) = pair(1024);
        near.write_all(b"goodbye").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"goodbye");
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_stops_the_writer_and_loses_nothing() {
        let (mut near, mut far) = pair(512);
        let all: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let sent = all.clone();
        let writer = tokio::spawn(async move {
            near.write_all(&sent).await.unwrap();
            assert!(near.waiting.len() <= WAITING_BYTES_MAX);
            near.shutdown().await.unwrap();
        });
        tokio::task::yield_now().await;
        assert!(!writer.is_finished());
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        writer.await.unwrap();
        assert_eq!(heard, all);
    }
}
