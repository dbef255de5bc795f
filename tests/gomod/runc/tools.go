//go:build tools

// Package runc names what the cluster's nodes run: the module has no code of its own.
package runc

import (
	_ "github.com/opencontainers/runc"
)
