package objects

import (
	"iter"
	"strings"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	resourcev1 "k8s.io/api/resource/v1"
	resourcev1alpha3 "k8s.io/api/resource/v1alpha3"
	schedulingv1 "k8s.io/api/scheduling/v1"
	schedulingv1beta1 "k8s.io/api/scheduling/v1beta1"
	storagev1 "k8s.io/api/storage/v1"
	storagemigrationv1 "k8s.io/api/storagemigration/v1"
	storagemigrationv1beta1 "k8s.io/api/storagemigration/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// DefaultPrefix is where the API server keeps its objects.
const DefaultPrefix = "/registry/"

// object is an API object that the protobuf code generator wrote.
type object interface {
	runtime.Object
	metav1.ObjectMetaAccessor
	Unmarshal([]byte) error
}

// kind is one that is decoded whole.
type kind struct {
	gvk schema.GroupVersionKind // as it is stored
	new func() object
}

// typedKinds are the kinds decoded whole, by the part of their storage keys
// between the prefix and the namespace or name, slash included.
func typedKinds() map[string]kind {
	core, apps, batch := corev1.SchemeGroupVersion, appsv1.SchemeGroupVersion, batchv1.SchemeGroupVersion
	return map[string]kind{
		"configmaps/":             {core.WithKind("ConfigMap"), func() object { return &corev1.ConfigMap{} }},
		"controllers/":            {core.WithKind("ReplicationController"), func() object { return &corev1.ReplicationController{} }},
		"limitranges/":            {core.WithKind("LimitRange"), func() object { return &corev1.LimitRange{} }},
		"minions/":                {core.WithKind("Node"), func() object { return &corev1.Node{} }},
		"namespaces/":             {core.WithKind("Namespace"), func() object { return &corev1.Namespace{} }},
		"persistentvolumeclaims/": {core.WithKind("PersistentVolumeClaim"), func() object { return &corev1.PersistentVolumeClaim{} }},
		"persistentvolumes/":      {core.WithKind("PersistentVolume"), func() object { return &corev1.PersistentVolume{} }},
		"pods/":                   {core.WithKind("Pod"), func() object { return &corev1.Pod{} }},
		"resourcequotas/":         {core.WithKind("ResourceQuota"), func() object { return &corev1.ResourceQuota{} }},
		"secrets/":                {core.WithKind("Secret"), func() object { return &corev1.Secret{} }},
		"serviceaccounts/":        {core.WithKind("ServiceAccount"), func() object { return &corev1.ServiceAccount{} }},
		"services/endpoints/":     {core.WithKind("Endpoints"), func() object { return &corev1.Endpoints{} }},
		"services/specs/":         {core.WithKind("Service"), func() object { return &corev1.Service{} }},

		"controllerrevisions/": {apps.WithKind("ControllerRevision"), func() object { return &appsv1.ControllerRevision{} }},
		"daemonsets/":          {apps.WithKind("DaemonSet"), func() object { return &appsv1.DaemonSet{} }},
		"deployments/":         {apps.WithKind("Deployment"), func() object { return &appsv1.Deployment{} }},
		"replicasets/":         {apps.WithKind("ReplicaSet"), func() object { return &appsv1.ReplicaSet{} }},
		"statefulsets/":        {apps.WithKind("StatefulSet"), func() object { return &appsv1.StatefulSet{} }},

		"cronjobs/": {batch.WithKind("CronJob"), func() object { return &batchv1.CronJob{} }},
		"jobs/":     {batch.WithKind("Job"), func() object { return &batchv1.Job{} }},

		"certificatesigningrequests/": {certificatesv1.SchemeGroupVersion.WithKind("CertificateSigningRequest"), func() object { return &certificatesv1.CertificateSigningRequest{} }},
		"csidrivers/":                 {storagev1.SchemeGroupVersion.WithKind("CSIDriver"), func() object { return &storagev1.CSIDriver{} }},
		"csistoragecapacities/":       {storagev1.SchemeGroupVersion.WithKind("CSIStorageCapacity"), func() object { return &storagev1.CSIStorageCapacity{} }},
		"csinodes/":                   {storagev1.SchemeGroupVersion.WithKind("CSINode"), func() object { return &storagev1.CSINode{} }},
		"endpointslices/":             {discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), func() object { return &discoveryv1.EndpointSlice{} }},
		"horizontalpodautoscalers/":   {autoscalingv2.SchemeGroupVersion.WithKind("HorizontalPodAutoscaler"), func() object { return &autoscalingv2.HorizontalPodAutoscaler{} }},
		"leases/":                     {coordinationv1.SchemeGroupVersion.WithKind("Lease"), func() object { return &coordinationv1.Lease{} }},
		"networkpolicies/":            {networkingv1.SchemeGroupVersion.WithKind("NetworkPolicy"), func() object { return &networkingv1.NetworkPolicy{} }},
		"poddisruptionbudgets/":       {policyv1.SchemeGroupVersion.WithKind("PodDisruptionBudget"), func() object { return &policyv1.PodDisruptionBudget{} }},
		"runtimeclasses/":             {nodev1.SchemeGroupVersion.WithKind("RuntimeClass"), func() object { return &nodev1.RuntimeClass{} }},
		"priorityclasses/":            {schedulingv1.SchemeGroupVersion.WithKind("PriorityClass"), func() object { return &schedulingv1.PriorityClass{} }},
		"storageclasses/":             {storagev1.SchemeGroupVersion.WithKind("StorageClass"), func() object { return &storagev1.StorageClass{} }},
		"volumeattachments/":          {storagev1.SchemeGroupVersion.WithKind("VolumeAttachment"), func() object { return &storagev1.VolumeAttachment{} }},

		// For upstream's controllers and nodes. What is stored in a beta version is decoded into the
		// types of the version after it, whose encoding is the same.
		"clustertrustbundles/":         {certificatesv1beta1.SchemeGroupVersion.WithKind("ClusterTrustBundle"), func() object { return &certificatesv1.ClusterTrustBundle{} }},
		"clusterroles/":                {rbacv1.SchemeGroupVersion.WithKind("ClusterRole"), func() object { return &rbacv1.ClusterRole{} }},
		"deviceclasses/":               {resourcev1.SchemeGroupVersion.WithKind("DeviceClass"), func() object { return &resourcev1.DeviceClass{} }},
		"devicetaintrules/":            {resourcev1.SchemeGroupVersion.WithKind("DeviceTaintRule"), func() object { return &resourcev1.DeviceTaintRule{} }},
		"ipaddresses/":                 {networkingv1.SchemeGroupVersion.WithKind("IPAddress"), func() object { return &networkingv1.IPAddress{} }},
		"podcertificaterequests/":      {certificatesv1beta1.SchemeGroupVersion.WithKind("PodCertificateRequest"), func() object { return &certificatesv1.PodCertificateRequest{} }},
		"podgroups/":                   {schedulingv1beta1.SchemeGroupVersion.WithKind("PodGroup"), func() object { return &schedulingv1beta1.PodGroup{} }},
		"resourceclaims/":              {resourcev1.SchemeGroupVersion.WithKind("ResourceClaim"), func() object { return &resourcev1.ResourceClaim{} }},
		"resourceclaimtemplates/":      {resourcev1.SchemeGroupVersion.WithKind("ResourceClaimTemplate"), func() object { return &resourcev1.ResourceClaimTemplate{} }},
		"resourcepoolstatusrequests/":  {resourcev1alpha3.SchemeGroupVersion.WithKind("ResourcePoolStatusRequest"), func() object { return &resourcev1alpha3.ResourcePoolStatusRequest{} }},
		"resourceslices/":              {resourcev1.SchemeGroupVersion.WithKind("ResourceSlice"), func() object { return &resourcev1.ResourceSlice{} }},
		"servicecidrs/":                {networkingv1.SchemeGroupVersion.WithKind("ServiceCIDR"), func() object { return &networkingv1.ServiceCIDR{} }},
		"storageversionmigrations/":    {storagemigrationv1beta1.SchemeGroupVersion.WithKind("StorageVersionMigration"), func() object { return &storagemigrationv1.StorageVersionMigration{} }},
		"validatingadmissionpolicies/": {admissionv1.SchemeGroupVersion.WithKind("ValidatingAdmissionPolicy"), func() object { return &admissionv1.ValidatingAdmissionPolicy{} }},
		"volumeattributesclasses/":     {storagev1.SchemeGroupVersion.WithKind("VolumeAttributesClass"), func() object { return &storagev1.VolumeAttributesClass{} }},
	}
}

// resourceOf returns the part of a key below the prefix that names its resource,
// slash included: "pods/" of "pods/ns/name".
func resourceOf(key string) string {
	n := strings.IndexByte(key, '/') + 1
	if key[:n] == "services/" {
		n += strings.IndexByte(key[n:], '/') + 1
	}
	return key[:n]
}

// The typed tables, one for each of typedKinds.

func (s *Snapshot) ConfigMaps() Table[*corev1.ConfigMap] {
	return newTable[*corev1.ConfigMap](s, "configmaps/")
}
func (s *Snapshot) Endpoints() Table[*corev1.Endpoints] {
	return newTable[*corev1.Endpoints](s, "services/endpoints/")
}
func (s *Snapshot) LimitRanges() Table[*corev1.LimitRange] {
	return newTable[*corev1.LimitRange](s, "limitranges/")
}
func (s *Snapshot) Namespaces() Table[*corev1.Namespace] {
	return newTable[*corev1.Namespace](s, "namespaces/")
}
func (s *Snapshot) Nodes() Table[*corev1.Node]     { return newTable[*corev1.Node](s, "minions/") }
func (s *Snapshot) Pods() Table[*corev1.Pod]       { return newTable[*corev1.Pod](s, "pods/") }
func (s *Snapshot) Secrets() Table[*corev1.Secret] { return newTable[*corev1.Secret](s, "secrets/") }
func (s *Snapshot) Services() Table[*corev1.Service] {
	return newTable[*corev1.Service](s, "services/specs/")
}

// PVs are the PersistentVolumes.
func (s *Snapshot) PVs() Table[*corev1.PersistentVolume] {
	return newTable[*corev1.PersistentVolume](s, "persistentvolumes/")
}

// PVCs are the PersistentVolumeClaims.
func (s *Snapshot) PVCs() Table[*corev1.PersistentVolumeClaim] {
	return newTable[*corev1.PersistentVolumeClaim](s, "persistentvolumeclaims/")
}
func (s *Snapshot) ReplicationControllers() Table[*corev1.ReplicationController] {
	return newTable[*corev1.ReplicationController](s, "controllers/")
}
func (s *Snapshot) ResourceQuotas() Table[*corev1.ResourceQuota] {
	return newTable[*corev1.ResourceQuota](s, "resourcequotas/")
}
func (s *Snapshot) ServiceAccounts() Table[*corev1.ServiceAccount] {
	return newTable[*corev1.ServiceAccount](s, "serviceaccounts/")
}

func (s *Snapshot) ControllerRevisions() Table[*appsv1.ControllerRevision] {
	return newTable[*appsv1.ControllerRevision](s, "controllerrevisions/")
}
func (s *Snapshot) DaemonSets() Table[*appsv1.DaemonSet] {
	return newTable[*appsv1.DaemonSet](s, "daemonsets/")
}
func (s *Snapshot) Deployments() Table[*appsv1.Deployment] {
	return newTable[*appsv1.Deployment](s, "deployments/")
}
func (s *Snapshot) ReplicaSets() Table[*appsv1.ReplicaSet] {
	return newTable[*appsv1.ReplicaSet](s, "replicasets/")
}
func (s *Snapshot) StatefulSets() Table[*appsv1.StatefulSet] {
	return newTable[*appsv1.StatefulSet](s, "statefulsets/")
}

func (s *Snapshot) CronJobs() Table[*batchv1.CronJob] {
	return newTable[*batchv1.CronJob](s, "cronjobs/")
}
func (s *Snapshot) Jobs() Table[*batchv1.Job] { return newTable[*batchv1.Job](s, "jobs/") }

func (s *Snapshot) CertificateSigningRequests() Table[*certificatesv1.CertificateSigningRequest] {
	return newTable[*certificatesv1.CertificateSigningRequest](s, "certificatesigningrequests/")
}
func (s *Snapshot) RuntimeClasses() Table[*nodev1.RuntimeClass] {
	return newTable[*nodev1.RuntimeClass](s, "runtimeclasses/")
}
func (s *Snapshot) ClusterTrustBundles() Table[*certificatesv1.ClusterTrustBundle] {
	return newTable[*certificatesv1.ClusterTrustBundle](s, "clustertrustbundles/")
}

// TrustBundlesOf yields the ClusterTrustBundles of a signer, in order of name: their
// names begin with the signer's.
func (s *Snapshot) TrustBundlesOf(signer string) iter.Seq[*certificatesv1.ClusterTrustBundle] {
	return func(yield func(*certificatesv1.ClusterTrustBundle) bool) {
		for b := range s.ClusterTrustBundles().scan(s.prefix + "clustertrustbundles/" + strings.ReplaceAll(signer, "/", ":") + ":") {
			if b.Spec.SignerName == signer && !yield(b) {
				return
			}
		}
	}
}
func (s *Snapshot) PodCertificateRequests() Table[*certificatesv1.PodCertificateRequest] {
	return newTable[*certificatesv1.PodCertificateRequest](s, "podcertificaterequests/")
}
func (s *Snapshot) CSIStorageCapacities() Table[*storagev1.CSIStorageCapacity] {
	return newTable[*storagev1.CSIStorageCapacity](s, "csistoragecapacities/")
}
func (s *Snapshot) CSIDrivers() Table[*storagev1.CSIDriver] {
	return newTable[*storagev1.CSIDriver](s, "csidrivers/")
}
func (s *Snapshot) CSINodes() Table[*storagev1.CSINode] {
	return newTable[*storagev1.CSINode](s, "csinodes/")
}
func (s *Snapshot) EndpointSlices() Table[*discoveryv1.EndpointSlice] {
	return newTable[*discoveryv1.EndpointSlice](s, "endpointslices/")
}

// HPAs are the HorizontalPodAutoscalers.
func (s *Snapshot) HPAs() Table[*autoscalingv2.HorizontalPodAutoscaler] {
	return newTable[*autoscalingv2.HorizontalPodAutoscaler](s, "horizontalpodautoscalers/")
}
func (s *Snapshot) Leases() Table[*coordinationv1.Lease] {
	return newTable[*coordinationv1.Lease](s, "leases/")
}
func (s *Snapshot) NetworkPolicies() Table[*networkingv1.NetworkPolicy] {
	return newTable[*networkingv1.NetworkPolicy](s, "networkpolicies/")
}
func (s *Snapshot) PodDisruptionBudgets() Table[*policyv1.PodDisruptionBudget] {
	return newTable[*policyv1.PodDisruptionBudget](s, "poddisruptionbudgets/")
}
func (s *Snapshot) PriorityClasses() Table[*schedulingv1.PriorityClass] {
	return newTable[*schedulingv1.PriorityClass](s, "priorityclasses/")
}
func (s *Snapshot) StorageClasses() Table[*storagev1.StorageClass] {
	return newTable[*storagev1.StorageClass](s, "storageclasses/")
}
func (s *Snapshot) VolumeAttachments() Table[*storagev1.VolumeAttachment] {
	return newTable[*storagev1.VolumeAttachment](s, "volumeattachments/")
}
func (s *Snapshot) DeviceClasses() Table[*resourcev1.DeviceClass] {
	return newTable[*resourcev1.DeviceClass](s, "deviceclasses/")
}
func (s *Snapshot) DeviceTaintRules() Table[*resourcev1.DeviceTaintRule] {
	return newTable[*resourcev1.DeviceTaintRule](s, "devicetaintrules/")
}
func (s *Snapshot) ResourceClaims() Table[*resourcev1.ResourceClaim] {
	return newTable[*resourcev1.ResourceClaim](s, "resourceclaims/")
}
func (s *Snapshot) ResourceSlices() Table[*resourcev1.ResourceSlice] {
	return newTable[*resourcev1.ResourceSlice](s, "resourceslices/")
}
