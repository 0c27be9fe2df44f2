//! Tokenizers, chat templates and streaming text filters. Pure: no files, sockets or threads.
