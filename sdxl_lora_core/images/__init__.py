"""Images, without any model: decoding, cropping, contact sheets, PNG."""
