//! The built-in pod network, CNI execution, port maps.
