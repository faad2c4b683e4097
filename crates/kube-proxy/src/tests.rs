//! Services in, fragments and transactions out; and the table in a network namespace of the kernel.
