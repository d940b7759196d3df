"""What a model scores on a task, document by document. May import `harness`."""
