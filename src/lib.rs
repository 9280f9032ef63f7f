//! hotloop: agent loops over one gRPC stream, where each step costs only what is new in it.
//!
//! # The life of a response
//!
//! A client opens a stream and sends `create`. [`service`] hands the bytes to [`wire`], which makes
//! a command of them or refuses it; the reader in [`stream`] gives the command to its lane. When
//! the turn of the response has come, [`lane`] drives it: [`request`] validates the new items
//! against the calls that are open, [`safety`] lets them through, [`render`] turns them into text
//! through the model's own [`template`] and, with the [`tokenizer`], into tokens behind those that
//! the [`ledger`] already holds. The [`backend`] samples. [`response`] turns tokens back into text
//! and, with [`parse`], into items, and the events go out while later tokens are still sampled.
//! When the sample ends, its tokens go on the ledger exactly as they were sampled, and [`session`]
//! keeps the response, so that the next create continues it by its id.
//!
//! # The modules, in reading order
//!
//! Imports point down only: a module uses those of its own level and of levels before it. Levels
//! 0, 1 and 3 know neither tokio nor tonic. A test holds the modules to this.

// Level 0, vocabulary: plain data, validation, codes.
pub mod event;
pub mod item;

// Level 1, mechanism: tokens and text.
pub mod files;
pub mod ledger;
pub mod parse;
pub mod template;
pub mod tokenizer;

// Level 2, seams: what samples, and what a model is made of.
pub mod backend;
pub mod billing;
pub mod budget;
pub mod model;
pub mod request;
pub mod safety;

// Level 3, one conversation: state machines without time or channels.
pub mod prompt;
pub mod render;
pub mod response;
pub mod session;

// Level 4, the drivers: all waiting is here.
pub mod archive;
pub mod drain;
pub mod lane;
pub mod store;
pub mod stream;

// Level 5, the edge: the only modules that know protobuf and gRPC.
pub mod auth;
pub mod proto;
pub mod service;
pub mod status;
pub mod wire;

// Level 6, composition and the command line.
pub mod agent;
pub mod config;
pub mod server;
pub mod telemetry;
