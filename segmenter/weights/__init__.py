"""From weight files of any origin to models, without running code from them; and our own format."""
