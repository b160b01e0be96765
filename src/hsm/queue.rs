//! A bounded queue that can be shut, and the threads that serve it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Why something was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Full,
    Shut,
}

/// First in, first out; full and shut queues answer at once. A thread serves one *term*: it is sent home when the queue is
/// shut, and one that comes back late from the module finds another term and goes home too.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    ready: Condvar,
    bound: usize,
}

struct State<T> {
    waiting: VecDeque<T>,
    term: Option<u64>,
    /// Threads that wait for work. With none, nobody has to be woken, which is a system call.
    idle: usize,
}

impl<T> Queue<T> {
    /// A shut queue of at most `bound` waiting.
    pub(super) fn new(bound: usize) -> Self {
        Self { state: Mutex::new(State { waiting: VecDeque::new(), term: None, idle: 0 }), ready: Condvar::new(), bound }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens it for the threads of `term`.
    pub(super) fn open(&self, term: u64) {
        self.lock().term = Some(term);
    }

    /// Whether anybody serves it.
    pub(super) fn is_open(&self) -> bool {
        self.lock().term.is_some()
    }

    /// Sends the threads home and hands back what was waiting.
    pub(super) fn shut(&self) -> Vec<T> {
        let mut state = self.lock();
        state.term = None;
        let waiting = state.waiting.drain(..).collect();
        self.ready.notify_all();
        waiting
    }

    pub(super) fn push(&self, work: T) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.term.is_none() {
            return Err(Refused::Shut);
        }
        if state.waiting.len() >= self.bound {
            return Err(Refused::Full);
        }
        state.waiting.push_back(work);
        let idle = state.idle > 0;
        drop(state);
        if idle {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Waits for work of `term`; `None`: go home.
    pub(super) fn next(&self, term: u64) -> Option<T> {
        let mut state = self.lock();
        loop {
            if state.term != Some(term) {
                return None;
            }
            if let Some(work) = state.waiting.pop_front() {
                return Some(work);
            }
            state.idle += 1;
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }
}

/// One thread's mark: since when it has been inside the module.
pub(super) struct Mark {
    started: Instant,
    /// Milliseconds since `started`, plus one; 0: not inside.
    inside_since: AtomicU64,
    given_up: AtomicBool,
    post: Post,
}

/// What a thread is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Post {
    /// A sign lane: given up if it hangs.
    Sign,
    /// The admin lane, or the watch.
    Single,
    /// The owner of this shard of session objects.
    Owner(usize),
}

impl Mark {
    /// Runs `call`, during which the thread counts as inside the module.
    pub(super) fn inside<R>(&self, call: impl FnOnce() -> R) -> R {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.inside_since.store(now + 1, Ordering::Relaxed);
        let result = call();
        self.inside_since.store(0, Ordering::Relaxed);
        result
    }

    /// Whether patience has ended: a lane given up goes home when it comes back.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    fn inside_for(&self) -> Option<Duration> {
        let since = self.inside_since.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.started.elapsed().saturating_sub(Duration::from_millis(since)))
    }
}

/// The threads of one token. Each takes its mark off when it ends, also by a panic.
pub(super) struct Crew {
    marks: Mutex<Vec<Arc<Mark>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    gone: Condvar,
}

/// How the threads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    /// Serving.
    pub(super) serving: usize,
    /// Given up: hanging inside the module.
    pub(super) hanging: usize,
    /// The admin lane, or the watch.
    pub(super) singles: usize,
}

impl Crew {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { marks: Mutex::default(), threads: Mutex::default(), gone: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Mark>>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread.
    pub(super) fn hire(
        self: &Arc<Self>,
        name: &str,
        post: Post,
        work: impl FnOnce(&Mark) + Send + 'static,
    ) -> std::io::Result<()> {
        struct Leave(Arc<Crew>, Arc<Mark>);
        impl Drop for Leave {
            fn drop(&mut self) {
                self.0.lock().retain(|mark| !Arc::ptr_eq(mark, &self.1));
                self.0.gone.notify_all();
            }
        }
        let mark =
            Arc::new(Mark { started: Instant::now(), inside_since: AtomicU64::new(0), given_up: AtomicBool::new(false), post });
        let leave = Leave(Arc::clone(self), Arc::clone(&mark));
        self.lock().push(Arc::clone(&mark));
        // A thread that is refused drops `leave`, and with it the mark.
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let leave = leave;
            work(&leave.1);
        })?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Gives up lanes that have been inside the module for longer than `patience`.
    pub(super) fn give_up(&self, patience: Duration) -> Count {
        let marks = self.lock();
        for mark in marks.iter().filter(|mark| mark.post == Post::Sign && mark.inside_for().is_some_and(|time| time > patience)) {
            if !mark.given_up.swap(true, Ordering::Relaxed) {
                tracing::error!("a sign lane hangs inside the PKCS#11 module; it is given up");
            }
        }
        Self::count_of(&marks)
    }

    /// How long a thread that is not given up has been inside the module, at the longest.
    pub(super) fn other_inside_for(&self) -> Option<Duration> {
        self.lock().iter().filter(|mark| mark.post != Post::Sign).filter_map(|mark| mark.inside_for()).max()
    }

    /// Whether somebody is at this post.
    pub(super) fn has(&self, post: Post) -> bool {
        self.lock().iter().any(|mark| mark.post == post)
    }

    pub(super) fn count(&self) -> Count {
        Self::count_of(&self.lock())
    }

    fn count_of(marks: &[Arc<Mark>]) -> Count {
        let hanging = marks.iter().filter(|mark| mark.post == Post::Sign && mark.is_given_up()).count();
        let of = |post| marks.iter().filter(|mark| mark.post == post).count();
        Count { serving: of(Post::Sign) - hanging, hanging, singles: of(Post::Single) }
    }

    /// Waits until nobody is left, and what the module keeps for each thread is gone too: a module that is finalized, or a process that
    /// ends, while a thread still clears up is a double free.
    pub(super) fn wait_until_gone(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let marks = self.lock();
        let (marks, _) =
            self.gone.wait_timeout_while(marks, patience, |marks| !marks.is_empty()).unwrap_or_else(PoisonError::into_inner);
        if !marks.is_empty() {
            return false;
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        drop(marks);
        let (joined, all) = std::sync::mpsc::channel();
        // Joining knows no deadline, and clearing up is code of the module.
        let joining = std::thread::Builder::new().name("hsm-join".into()).spawn(move || {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            let _ = joined.send(());
        });
        joining.is_ok() && all.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_and_a_shut_queue_answer_at_once() {
        let queue = Queue::new(2);
        assert_eq!(queue.push(0), Err(Refused::Shut));
        queue.open(1);
        assert_eq!((queue.push(1), queue.push(2), queue.push(3)), (Ok(()), Ok(()), Err(Refused::Full)));
        assert_eq!(queue.next(1), Some(1));
        assert_eq!(queue.shut(), [2]);
        assert_eq!(queue.next(1), None);
    }

    #[test]
    fn a_thread_of_an_earlier_term_is_sent_home() {
        let queue = Queue::new(1);
        queue.open(2);
        queue.push(()).unwrap();
        assert_eq!(queue.next(1), None);
        assert_eq!(queue.next(2), Some(()));
    }

    #[test]
    fn a_lane_inside_for_too_long_is_given_up_and_waiting_for_it_ends() {
        let crew = Crew::new();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (entered, inside) = std::sync::mpsc::channel();
        crew.hire("lane", Post::Sign, move |mark| {
            mark.inside(|| {
                entered.send(()).unwrap();
                held.recv().unwrap();
            });
        })
        .unwrap();
        inside.recv().unwrap();
        assert!(!crew.wait_until_gone(Duration::from_millis(20)));
        assert_eq!(crew.give_up(Duration::from_millis(1)), Count { serving: 0, hanging: 1, singles: 0 });
        release.send(()).unwrap();
        assert!(crew.wait_until_gone(Duration::from_secs(5)));
    }

    #[test]
    fn a_panicking_thread_leaves_no_mark() {
        let crew = Crew::new();
        crew.hire("lane", Post::Sign, |_| panic!("as a misbehaving module makes the wrapper do")).unwrap();
        assert!(crew.wait_until_gone(Duration::from_secs(5)));
    }
}
