//! What client-go is: kube-rs plus informers, keyed work queue with back-off, leader election, events.
