package upstream

import (
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
)

// ours are the controllers that a reconciler of Timonel stands for, by its name.
var ours = map[string]string{
	names.CronJobController:                         "cronjob-controller",
	names.DaemonSetController:                       "daemonset-controller",
	names.DeploymentController:                      "deployment-controller",
	names.DisruptionController:                      "disruption-controller",
	names.EndpointSliceController:                   "endpointslice-controller",
	names.EndpointSliceMirroringController:          "endpoint-slice-mirroring-controller",
	names.EndpointsController:                       "endpoint-controller",
	names.EphemeralVolumeController:                 "ephemeral-volume-controller",
	names.GarbageCollectorController:                "garbage-collector-controller",
	names.JobController:                             "job-controller",
	names.NamespaceController:                       "namespace-controller",
	names.NodeIpamController:                        "node-ipam-controller",
	names.NodeLifecycleController:                   "node-lifecycle-controller",
	names.PersistentVolumeBinderController:          "persistentvolume-controller",
	names.PersistentVolumeClaimProtectionController: "persistentvolumeclaim-protection-controller",
	names.PersistentVolumeProtectionController:      "persistentvolume-protection-controller",
	names.PodGarbageCollectorController:             "pod-garbage-collector-controller",
	names.ReplicaSetController:                      "replicaset-controller",
	names.ReplicationControllerController:           "replication-controller",
	names.RootCACertificatePublisherController:      "namespace-defaults-controller",
	names.ServiceAccountController:                  "serviceaccount-controller",
	names.ServiceAccountTokenController:             "serviceaccount-token-controller",
	names.StatefulSetController:                     "statefulset-controller",
	names.TTLAfterFinishedController:                "ttl-after-finished-controller",
	names.VolumeAttributesClassProtectionController: "volumeattributesclass-protection-controller",
	names.TaintEvictionController:                   "taint-eviction-controller",
}

// leftOut are the controllers that nobody stands for, with the reason.
var leftOut = map[string]string{
	names.BootstrapSignerController:                "off in upstream too; it signs kubeadm's cluster-info, and machines join Timonel by tokens of its own",
	names.TokenCleanerController:                   "off in upstream too; the API takes no bootstrap tokens, and Timonel's join tokens expire by themselves",
	names.SELinuxWarningController:                 "off in upstream too; it only warns, of volumes on nodes with SELinux",
	names.StorageVersionGarbageCollectorController: "behind a feature that is off in upstream too (StorageVersionAPI, alpha): there are no StorageVersions",
}

// started is one of upstream's controllers that runs here.
type started struct {
	name string
	// on are the resources of which one object must exist before the controller is
	// built; none: it always is.
	on []schema.GroupVersionResource
}

func resource(group, version, name string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: group, Version: version, Resource: name}
}

// run are the controllers that run here.
func run() []started {
	claims, templates := resource("resource.k8s.io", "v1", "resourceclaims"), resource("resource.k8s.io", "v1", "resourceclaimtemplates")
	slices, rules := resource("resource.k8s.io", "v1", "resourceslices"), resource("resource.k8s.io", "v1", "devicetaintrules")
	requests := resource("certificates.k8s.io", "v1", "certificatesigningrequests")
	on := func(r ...schema.GroupVersionResource) []schema.GroupVersionResource { return r }
	return []started{
		{names.ResourceQuotaController, on(resource("", "v1", "resourcequotas"))},
		{names.ClusterRoleAggregationController, nil},
		{names.CertificateSigningRequestSigningController, on(requests)},
		{names.CertificateSigningRequestApprovingController, on(requests)},
		{names.CertificateSigningRequestCleanerController, on(requests)},
		{names.PodCertificateRequestCleanerController, on(resource("certificates.k8s.io", "v1", "podcertificaterequests"))},
		{names.KubeAPIServerClusterTrustBundlePublisherController, nil},
		{names.HorizontalPodAutoscalerController, on(resource("autoscaling", "v2", "horizontalpodautoscalers"))},
		{names.TTLController, on(resource("", "v1", "nodes"))},
		{names.ServiceCIDRController, nil},
		{names.ValidatingAdmissionPolicyStatusController, on(resource("admissionregistration.k8s.io", "v1", "validatingadmissionpolicies"))},
		{names.LegacyServiceAccountTokenCleanerController, on(resource("", "v1", "secrets"))},
		{names.PersistentVolumeAttachDetachController, on(resource("storage.k8s.io", "v1", "csidrivers"), resource("storage.k8s.io", "v1", "volumeattachments"))},
		{names.PersistentVolumeExpanderController, on(resource("", "v1", "persistentvolumeclaims"))},
		{names.ResourceClaimController, on(claims, templates)},
		{names.DeviceTaintEvictionController, on(slices, rules)},
		{names.StorageVersionMigratorController, on(resource("storagemigration.k8s.io", "v1", "storageversionmigrations"))},
		// These are behind features that are off in upstream too; they run where they are on.
		{names.PodGroupProtectionController, on(resource("scheduling.k8s.io", "v1beta1", "podgroups"))},
		{names.ResourcePoolStatusRequestController, on(resource("resource.k8s.io", "v1alpha3", "resourcepoolstatusrequests"))},
	}
}
