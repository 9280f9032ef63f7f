//! Server-sent events out of the bytes of a body, a bounded number of bytes at a time.
//!
//! The parsers to be had as crates hold as much of an event as comes; a service that never ends a
//! line would fill the memory.

use std::fmt;

/// One event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SseEvent {
    /// Its type; empty where it has none.
    pub(super) name: String,
    /// Its lines of data.
    pub(super) data: String,
}

/// Why bytes are no events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SseError {
    /// An event is over this limit, in bytes.
    TooLong(usize),
    /// It is no UTF-8.
    NotText,
}

impl fmt::Display for SseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(max) => write!(f, "an event is over {max} bytes"),
            Self::NotText => f.write_str("an event is no text"),
        }
    }
}

/// Takes bytes as they come, and gives events.
#[derive(Debug)]
pub(super) struct SseParser {
    /// The most bytes of one event, its lines together.
    event_bytes_max: usize,
    bytes: Vec<u8>,
    /// Lines before here are read.
    line: usize,
    /// There is no end of a line between `line` and here.
    looked: usize,
    /// The last line ended in a carriage return: a newline that follows belongs to it.
    after_return: bool,
    name: String,
    data: Option<String>,
}

impl SseParser {
    /// For events of at most so many bytes, their lines together.
    pub(super) fn new(event_bytes_max: usize) -> Self {
        Self {
            event_bytes_max,
            bytes: Vec::new(),
            line: 0,
            looked: 0,
            after_return: false,
            name: String::new(),
            data: None,
        }
    }

    /// Takes what was read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.line);
        self.looked -= self.line;
        self.line = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next event that is whole. An error ends the stream.
    pub(super) fn next(&mut self) -> Result<Option<SseEvent>, SseError> {
        while let Some(end) = self.line_end() {
            let line = std::str::from_utf8(&self.bytes[self.line..end]);
            let line = line.map_err(|_| SseError::NotText)?;
            let data_bytes = self.data.as_ref().map_or(0, String::len);
            if line.len() + data_bytes > self.event_bytes_max {
                return Err(SseError::TooLong(self.event_bytes_max));
            }
            let blank = line.is_empty();
            match line.split_once(':').unwrap_or((line, "")) {
                ("data", value) => {
                    let value = value.strip_prefix(' ').unwrap_or(value);
                    match &mut self.data {
                        Some(data) => {
                            data.push('\n');
                            data.push_str(value);
                        }
                        None => self.data = Some(value.to_owned()),
                    }
                }
                ("event", value) => {
                    self.name = value.strip_prefix(' ').unwrap_or(value).to_owned();
                }
                // A comment, or a field that is of no use here.
                _ => {}
            }
            self.after_return = self.bytes[end] == b'\r';
            self.line = end + 1;
            self.looked = self.line;
            if blank {
                let name = std::mem::take(&mut self.name);
                if let Some(data) = self.data.take() {
                    return Ok(Some(SseEvent { name, data }));
                }
            }
        }
        if self.bytes.len() - self.line > self.event_bytes_max {
            return Err(SseError::TooLong(self.event_bytes_max));
        }
        Ok(None)
    }

    fn line_end(&mut self) -> Option<usize> {
        if self.after_return
            && let Some(first) = self.bytes.get(self.line)
        {
            self.after_return = false;
            if *first == b'\n' {
                self.line += 1;
                self.looked = self.looked.max(self.line);
            }
        }
        let found = memchr::memchr2(b'\n', b'\r', &self.bytes[self.looked..]);
        match found {
            Some(at) => Some(self.looked + at),
            None => {
                self.looked = self.bytes.len();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 10;

    fn events(pieces: &[&[u8]]) -> Result<Vec<(String, String)>, SseError> {
        let mut parser = SseParser::new(MAX);
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(piece);
            while let Some(event) = parser.next()? {
                events.push((event.name, event.data));
            }
        }
        Ok(events)
    }

    #[test]
    fn events_do_not_depend_on_where_the_bytes_are_cut() {
        let text = ": hello\n\ndata: one\n\nevent: error\r\ndata:two\r\ndata: three\r\n\r\nid: 4\ndata\r\rdata: é\n\n";
        let expected = [("", "one"), ("error", "two\nthree"), ("", ""), ("", "é")]
            .map(|(name, data)| (name.to_owned(), data.to_owned()));
        for size in 1..text.len() {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            assert_eq!(events(&pieces).unwrap(), expected, "pieces of {size}");
        }
    }

    #[test]
    fn an_event_that_is_not_ended_is_none() {
        assert_eq!(events(&[b"data: one\n"]), Ok(vec![]));
    }

    #[test]
    fn an_event_over_the_limit_is_an_error_and_not_kept() {
        let long = vec![b'x'; MAX / 2];
        assert_eq!(
            events(&[b"data:", &long, &long, b"x"]),
            Err(SseError::TooLong(MAX))
        );
        let lines = [b"data:".as_slice(), &long, b"\n"];
        assert_eq!(
            events(&[lines, lines, lines].concat()),
            Err(SseError::TooLong(MAX))
        );
        assert_eq!(events(&[b"data: \xff\n\n"]), Err(SseError::NotText));
    }
}
