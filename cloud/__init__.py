"""The model owner's side: workers that run the frozen span for enrolled edges."""
