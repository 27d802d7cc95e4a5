package main

import (
	"context"
	"fmt"
	"time"

	"timonel/agent"
)

// cleanup ends and removes all that the agent made on this machine.
func cleanup(ctx context.Context, o *options) error {
	if err := o.checkCommon(); err != nil {
		return err
	}
	log, err := o.logger()
	if err != nil {
		return err
	}
	unlock, err := lock(o.dataDir)
	if err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	defer unlock()
	cfg := agent.Config{Name: o.name, DataDir: o.dataDir, KubeletDir: o.kubeletDir, CgroupRoot: o.cgroupRoot, Bridge: o.bridge, ContainerdSocket: o.containerd, Logger: log}
	cfg.SetDefaults()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return agent.Cleanup(ctx, cfg, o.keepData)
}
