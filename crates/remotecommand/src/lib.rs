//! Exec and attach streams: WebSocket v5 and SPDY/3.1 framing, client and server.
