//go:build tools

// Package coredns names what the cluster's nodes run: the module has no code of its own.
package coredns

import (
	_ "github.com/coredns/coredns"
)
